"""The target drafts for itself, reading the first and the last tokens (Xiao et al., arXiv 2309.17453; a baseline)."""

from specattn_vllm.methods.base import Method
from specattn_vllm.methods.budget import ShareOptions
from specattn_vllm.methods.self_draft import CROSSOVER, DRAFT_LENGTH, SelfDraftOptions


class StreamingOptions(SelfDraftOptions, ShareOptions):
    """The budget of draft steps."""


METHOD = Method(
    name="streamingllm",
    summary="the target drafts for itself, reading the first and the last tokens (lossless; a baseline)",
    target_reads="everything",
    options=StreamingOptions,
    draft_length=DRAFT_LENGTH,
    crossover=CROSSOVER,
    paper="here it is a baseline with the same budget as 'vegas'",
    speculator="specattn_vllm.speculation.self_speculator.WindowSpeculator",
)
