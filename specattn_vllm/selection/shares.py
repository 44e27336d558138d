"""Selections of layers that get shares of their own out of one budget.

How much of the context a layer has to read differs far more between layers than between requests, and the draft's
attention does not tell it: a layer map may have it from calibration, as each target layer's share of the mean.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from specattn_vllm.executors import Operations
from specattn_vllm.methods.budget import ShareOptions
from specattn_vllm.selection.choose import Limits, choose

FULL = 1 << 16  # the kernels count shares of a context in 65,536ths


class Choice(NamedTuple):
    """What one selection is made from, and how much of the context it keeps."""

    source: int
    """Index of the draft layer."""
    fraction: float | None = None
    """0 to 1, None where the rule alone decides."""
    induction: bool = False
    """Whether what follows earlier occurrences of the round's tokens counts more (`Induction`)."""


class SharedOut:
    """T selections from the mass of S <= T draft layers: of each its heaviest tokens, as many as its fraction
    of the context.

    Bits and counts have buffers of their own, at the same addresses for every round of as many rows.
    """

    def __init__(
        self,
        options: ShareOptions,
        selections: tuple[tuple[int, float], ...],
        *,
        groups: int,
        max_num_reqs: int,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        """selections: of each, the index of its source and how much of the context it keeps, 0 to 1."""
        self.limits = Limits.of_budgets(options)
        self.groups = groups
        sources, fractions = zip(*selections, strict=True)
        self._sources = torch.tensor(sources, dtype=torch.int64, device=device)
        parts = [round(fraction * FULL) for fraction in fractions]
        self._parts = torch.tensor(parts, dtype=torch.int64, device=device)
        # Of any number of requests, one row of mass each for every group.
        self._rows = torch.arange(max_num_reqs * groups, device=device).view(max_num_reqs, groups)
        self.words = -(-max_model_len // 32)
        rows = len(parts) * max_num_reqs * groups
        self._bits = torch.empty(rows * self.words, dtype=torch.int32, device=device)
        self._counts = torch.empty(rows, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self._bits, self._counts, self._sources, self._parts, self._rows))

    def bits(self, num_reqs: int) -> torch.Tensor:
        """[T, R, G, W] int32; what it held before a choice is undefined."""
        shape = (len(self._parts), num_reqs, self.groups, self.words)
        return self._bits[: shape[0] * shape[1] * shape[2] * shape[3]].view(shape)

    def choose(self, operations: Operations, mass: torch.Tensor, lens: torch.Tensor, *, union: bool) -> None:
        """From mass [S, R, G, L] float32, of each row the first lens [R] int32 tokens."""
        num_reqs = mass.shape[1]
        bits = self.bits(num_reqs)
        counts = self._counts[: bits[..., 0].numel()].view(bits.shape[:3])
        # As a cap of that share of the context is counted: rounded up.
        wanted = ((lens.long() * self._parts[:, None] + (FULL - 1)) >> 16).int()
        choose(
            operations,
            self.limits,
            mass,
            lens.view(1, -1, 1),
            bits,
            counts,
            union=union,
            budgets=wanted[:, :, None].expand_as(counts).contiguous(),
            mass_rows=self._sources[:, None, None] * (num_reqs * self.groups) + self._rows[:num_reqs],
        )
