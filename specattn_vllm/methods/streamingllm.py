"""The target drafts for itself, reading the first and the last tokens (Xiao et al., arXiv 2309.17453; a baseline)."""

from specattn_vllm.methods.base import Method
from specattn_vllm.methods.budget import ShareOptions
from specattn_vllm.methods.vegas import CROSSOVER, SPECULATOR

METHOD = Method(
    name="streamingllm",
    summary="the target drafts for itself, reading the first and the last tokens (lossless; a baseline)",
    drafter="target",
    target_reads="everything",
    options=ShareOptions,
    window=True,
    crossover=CROSSOVER,
    paper="here it is a baseline with the same budget as 'vegas'",
    speculator=SPECULATOR,
)
