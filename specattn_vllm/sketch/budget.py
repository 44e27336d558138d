"""The budget of a sketch, from the options."""

from __future__ import annotations

from dataclasses import replace

from specattn_vllm.kernels.sketch.contracts import Budget
from specattn_vllm.methods.budget import BudgetOptions, SketchedDraftOptions


def budget_of(options: BudgetOptions, shared: str) -> Budget:
    """The target's budget. `shared`: the heads that share it (`SketchedDraftOptions.heads_share`)."""
    fixed = options.fixed_budget
    return Budget(
        ratio=min(options.ratio, options.max_fraction) if fixed else options.max_fraction,
        top_p=None if fixed else options.top_p,
        shared=shared if fixed else "none",
        min_tokens=options.min_tokens,
        max_tokens=-1 if options.max_tokens is None else options.max_tokens,
        sink=options.sink_tokens,
        recent=options.recent_tokens,
    )


def draft_budget_of(options: SketchedDraftOptions) -> Budget:
    """The budget of a sparse draft model. Its heads share nothing, which keeps the page tables of a round narrow."""
    budget = budget_of(options, "none")
    if options.draft_ratio is None:
        return budget
    return replace(budget, ratio=options.draft_ratio, top_p=None)
