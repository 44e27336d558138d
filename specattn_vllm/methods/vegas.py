"""The target drafts for itself, reading the tokens that its last verification attended to (Yue et al., arXiv
2602.07223)."""

from specattn_vllm.methods.base import Method
from specattn_vllm.methods.budget import BudgetOptions
from specattn_vllm.methods.self_draft import CROSSOVER, DRAFT_LENGTH, SelfDraftOptions
from specattn_vllm.options import for_researchers

MAX_DILATION = 64  # the kernel's limit


class VegasOptions(SelfDraftOptions, BudgetOptions):
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
    target_reads="everything",
    options=VegasOptions,
    draft_length=DRAFT_LENGTH,
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
    speculator="specattn_vllm.speculation.self_speculator.SelfSpeculator",
)
