"""The target drafts for itself, reading the tokens that its last verification attended to (Yue et al., arXiv
2602.07223)."""

from specattn_vllm.methods.base import Method
from specattn_vllm.methods.budget import BudgetOptions
from specattn_vllm.options import for_researchers

SPECULATOR = "specattn_vllm.speculation.self_speculator.SelfSpeculator"
# An estimate, not measured: below this, even a draft step that read no KV entry would save only a thirtieth of the
# bytes that a step of an 8B model reads.
CROSSOVER = {"fa3": 4096}

MAX_DILATION = 64  # the kernel's limit


class VegasOptions(BudgetOptions):
    """The budget of draft steps, and the dilation of the attention mass."""

    dilation: int | None = for_researchers(
        None,
        ge=0,
        le=MAX_DILATION,
        description="Number of positions by which attention mass is spread forward before tokens are selected. Heads "
        "that copy text attend to the next token in each step, and so find it selected. Default: K + 1, which covers a "
        "round of K draft tokens.",
    )

    def dilation_of(self, draft_tokens: int) -> int:
        """Positions by which attention mass is spread forward, for rounds of `draft_tokens` tokens."""
        return min(draft_tokens + 1, MAX_DILATION) if self.dilation is None else self.dilation


METHOD = Method(
    name="vegas",
    summary="the target drafts for itself, reading what its last verification attended to (lossless)",
    drafter="target",
    target_reads="everything",
    options=VegasOptions,
    crossover=CROSSOVER,
    # 7% of the context, at least 256 tokens, one selection for all heads of a layer. The authors' code defaults to 5%.
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
