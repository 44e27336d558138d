"""From attention mass to the set of tokens that is kept: one rule for every method."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from specattn_vllm.executors import Operations
from specattn_vllm.options import SpecAttnOptions


@dataclass(frozen=True)
class Limits:
    """What `select_top_p` is told besides the mass; counts are in tokens.

    A fixed budget (rule 'top_k') is a top-p of everything under a cap: the heaviest tokens up to the cap.
    """

    top_p: float
    min_tokens: int
    max_tokens: int
    """-1: no limit."""
    max_fraction: float
    sink: int
    recent: int

    @classmethod
    def of(cls, options: SpecAttnOptions) -> Limits:
        fixed = options.fixed_budget
        return cls(
            top_p=1.0 if fixed else options.top_p,
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
    """Bits of every layer, row and group: mass [S, R, G, L] float32, lens [R] int32, bits [S, R, G, W] int32 and counts
    [S, R, G] int32, all contiguous but lens. The first `lens` tokens of a row are ranked."""
    rows = counts.numel()
    if rows == 0:
        return
    operations.select_top_p(
        mass.view(rows, -1),
        lens.view(1, -1, 1).expand_as(counts).flatten().contiguous(),
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
