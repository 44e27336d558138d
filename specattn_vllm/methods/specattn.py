"""The draft model's attention prunes the target's verification (Shah, arXiv 2510.27641)."""

from specattn_vllm.methods.base import Method
from specattn_vllm.methods.budget import ratio_field
from specattn_vllm.methods.by_draft import SPECULATOR, ByDraftOptions

# H200, Llama-8B with 1B shapes, bf16, K = 5, 2026-11-26 (docs/benchmarks.md, "Stepping aside"). Milliseconds of a round
# with dense verification -> with pruned verification; the draft model reads the same share. Ratio 0.1: one request of
# 4k 11.37 -> 11.56, four of 4k 12.23 -> 12.21, one of 32k 12.86 -> 12.44. Ratio 0.25: 11.45 -> 11.67 and 12.48 ->
# 12.52. With a dense draft, one request of 32k takes 13.79 with dense verification and 13.70 with ratio 0.25.
CROSSOVER = {"fa3": 32768}


class SpecattnOptions(ByDraftOptions):
    """As `sts`, with a larger default ratio, because all heads of a layer read the same tokens."""

    ratio: float = ratio_field(0.25)


METHOD = Method(
    name="specattn",
    summary="the draft model's attention chooses what the target's verification reads (approximate)",
    target_reads="draft's choice",
    options=SpecattnOptions,
    maps=("specattn",),
    plan="specattn_vllm.speculation.maps.plan_for_layers",
    check="specattn_vllm.speculation.maps.resolve_layer_map",
    speculator=SPECULATOR,
    crossover=CROSSOVER,
    # The union of each draft step's top-p selection; the first two layers are dense; no token is always kept.
    paper={
        "rule": "top_p",
        "top_p": 0.97,
        "combine": "union",
        "dense_layers": (0, 1),
        "min_tokens": 0,
        "sink_tokens": 0,
        "recent_tokens": 0,
    },
)
