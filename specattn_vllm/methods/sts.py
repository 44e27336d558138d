"""As `specattn`, for each KV head what the draft head it is mapped to attended to (Xu et al., arXiv 2605.15508)."""

from specattn_vllm.methods.base import Method
from specattn_vllm.methods.by_draft import ByDraftOptions
from specattn_vllm.methods.specattn import CROSSOVER

METHOD = Method(
    name="sts",
    summary="each KV head reads what the draft head it is mapped to attended to (approximate)",
    drafter="draft model",
    target_reads="draft's choice",
    options=ByDraftOptions,
    per_head=True,
    maps=("sts", "specattn"),
    crossover=CROSSOVER,
    # A fixed budget of tokens for each head, whatever the context.
    paper={
        "rule": "top_k",
        "ratio": 1.0,
        "min_tokens": 0,
        "max_tokens": 256,
        "sink_tokens": 0,
        "recent_tokens": 0,
    },
)
