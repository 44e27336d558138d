"""The target drafts for itself, reading what its own last verification attended to (Yue et al., arXiv 2602.07223)."""

from specattn_vllm.methods.base import BUDGET, Method

SPECULATOR = "specattn_vllm.speculation.self_speculator.SelfSpeculator"
# Not measured: below it, drafts that read nothing at all would save a thirtieth of what a step of an 8B model reads.
CROSSOVER = {"fa3": 4096}

METHOD = Method(
    name="vegas",
    summary="the target drafts for itself, reading what its last verification attended to (lossless)",
    drafter="target",
    target_reads="everything",
    options=BUDGET | {"dilation"},
    crossover=CROSSOVER,
    # 7% of the context and 256 tokens at least, one set for all heads of a layer; the class's own default is 5%.
    paper={
        "rule": "top_k",
        "ratio": 0.07,
        "min_tokens": 256,
        "sink_tokens": 0,
        "recent_tokens": 0,
        "dilation": 0,
    },
    speculator=SPECULATOR,
)
