"""From attention mass to the set of tokens that are kept: one rule for all methods."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from specattn_vllm.executors import Operations
from specattn_vllm.methods.budget import ShareOptions


@dataclass(frozen=True)
class Limits:
    """The budget arguments of `select_top_p`. Counts are in tokens.

    A fixed budget (rule 'top_k') is top_p = 1 with a cap: the heaviest tokens up to the cap. The cap is a share of the
    context, at least `min_tokens` and at most `max_tokens`.
    """

    top_p: float
    min_tokens: int
    max_tokens: int
    """-1: no limit."""
    max_fraction: float
    sink: int
    recent: int

    @classmethod
    def of(cls, options: ShareOptions) -> Limits:
        fixed = options.fixed_budget
        return cls(
            top_p=options.mass_share,
            min_tokens=options.min_tokens,
            max_tokens=-1 if options.max_tokens is None else options.max_tokens,
            max_fraction=min(options.ratio, options.max_fraction) if fixed else options.max_fraction,
            sink=options.sink_tokens,
            recent=options.recent_tokens,
        )


def choose(
    operations: Operations,
    limits: Limits,
    mass: torch.Tensor,
    lens: torch.Tensor,
    bits: torch.Tensor,
    counts: torch.Tensor,
    *,
    union: bool = False,
) -> None:
    """Choose tokens for every row of mass, with any leading dimensions.

    mass [..., L] float32, bits [..., W] and counts [...] int32, contiguous; lens int32: how many tokens of each row are
    ranked; its shape must broadcast to that of counts.
    """
    rows = counts.numel()
    if rows == 0:
        return
    operations.select_top_p(
        mass.view(-1, mass.shape[-1]),
        lens.expand_as(counts).flatten().contiguous(),
        bits.view(rows, -1),
        counts.view(rows),
        limits.top_p,
        limits.min_tokens,
        limits.max_tokens,
        limits.max_fraction,
        limits.sink,
        limits.recent,
        union,
    )
