"""Attention mass of draft layers, and the tokens chosen by it, in buffers for any number of rows."""

from __future__ import annotations

import torch

from specattn_vllm.executors import Operations
from specattn_vllm.selection.choose import Limits, choose


class Ranking:
    """Mass of S layers in G score groups, the bits of the chosen tokens, and the number of chosen tokens.

    After `begin(R)`: mass [S, R, G, L] float32, bits [S, R, G, W] int32 and counts [S, R, G] int32, contiguous, at the
    same addresses in every round of R rows. Their contents are undefined then.
    """

    def __init__(self, layers: int, groups: int, max_num_reqs: int, max_model_len: int, device: torch.device) -> None:
        self.layers, self.groups, self.max_model_len = layers, groups, max_model_len
        self.words = -(-max_model_len // 32)
        # Flat buffers, so that [S, R, G, ...] is contiguous for any number of rows.
        rows = layers * max_num_reqs * groups
        self._mass = torch.empty(rows * max_model_len, dtype=torch.float32, device=device)
        self._bits = torch.empty(rows * self.words, dtype=torch.int32, device=device)
        self._counts = torch.empty(rows, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        return self._mass.nbytes + self._bits.nbytes + self._counts.nbytes

    def begin(self, num_reqs: int) -> None:
        """Shape the buffers for `num_reqs` rows."""
        shape = (self.layers, num_reqs, self.groups)
        rows = shape[0] * shape[1] * shape[2]
        self.mass = self._mass[: rows * self.max_model_len].view(*shape, self.max_model_len)
        self.bits = self._bits[: rows * self.words].view(*shape, self.words)
        self.counts = self._counts[:rows].view(*shape)

    def choose(self, operations: Operations, limits: Limits, lens: torch.Tensor, *, union: bool) -> None:
        """Set the bits by the mass on the first lens [R] int32 tokens of each row."""
        choose(operations, limits, self.mass, lens.view(1, -1, 1), self.bits, self.counts, union=union)
