"""Full attention: the control, and speculation with a cheaper draft model (`sparse_draft`)."""

from specattn_vllm.methods.base import BUDGET, Method

METHOD = Method(
    name="dense",
    summary="the target reads everything (lossless; the control)",
    drafter="any",
    target_reads="everything",
    options=frozenset({"sparse_draft"}),
    draft_options=BUDGET | {"draft_ratio", "sketch_bits"},
    # By the times of its kernels: a 1B model's round of six steps and one search (docs/sketch.md).
    draft_crossover={"fa3": 16384},
    paper="it reads everything",
)
