"""The draft model's attention prunes the target's verification (Shah, arXiv 2510.27641)."""

from specattn_vllm.methods.base import Method
from specattn_vllm.methods.budget import ratio_field
from specattn_vllm.methods.by_draft import ByDraftOptions

# H200, Llama-8B with 1B shapes, bf16, K = 5, 2026-11-26 (docs/benchmarks.md, "Stepping aside"). Milliseconds of a round
# that verifies everything and of one that is pruned, with a draft that reads as much: of a tenth 11.37 and 11.56 for
# one request of 4k, 12.23 and 12.21 for four, 12.86 and 12.44 for one of 32k; of a quarter 11.45 and 11.67, and 12.48
# and 12.52. With a draft that reads everything, one of 32k takes 13.79 and with a quarter 13.70.
CROSSOVER = {"fa3": 32768}


class SpecattnOptions(ByDraftOptions):
    """As `sts`, and a larger share: all heads of a layer read the same."""

    ratio: float = ratio_field(0.25)


METHOD = Method(
    name="specattn",
    summary="the draft model's attention chooses what the target's verification reads (approximate)",
    drafter="draft model",
    target_reads="draft's choice",
    options=SpecattnOptions,
    maps=("specattn",),
    crossover=CROSSOVER,
    # Top-p of each draft step, united; the first two layers dense; no token always kept.
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
