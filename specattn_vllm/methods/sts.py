"""As `specattn`, but each KV head of the target reads the tokens that one KV head of the draft model attended to (Xu et
al., arXiv 2605.15508). The layer map names that draft head."""

from specattn_vllm.methods.base import Method
from specattn_vllm.methods.by_draft import SPECULATOR, ByDraftOptions
from specattn_vllm.methods.specattn import CROSSOVER

METHOD = Method(
    name="sts",
    summary="each KV head reads the tokens that its mapped KV head of the draft model attended to (approximate)",
    target_reads="draft's choice",
    options=ByDraftOptions,
    per_head=True,
    maps=("sts", "specattn"),
    map_keys=("layers", "heads"),
    plan="specattn_vllm.speculation.maps.plan_for_heads",
    smaller=", or set method='specattn', whose heads share page tables",
    check="specattn_vllm.speculation.maps.check_heads",
    speculator=SPECULATOR,
    crossover=CROSSOVER,
    # A fixed number of tokens for each head, independent of the context length.
    paper={
        "rule": "top_k",
        "ratio": 1.0,
        "min_tokens": 0,
        "max_tokens": 256,
        "sink_tokens": 0,
        "recent_tokens": 0,
    },
)
