"""What the draft itself reads, with `sparse_draft`: a list of positions for each layer and row of the batch."""

from __future__ import annotations

import torch

from specattn_vllm.executors import Operations
from specattn_vllm.stats import Counters


class DraftLists:
    """Lists of positions in batch order. What a layer's step 0 attended to is its choice; the later steps of the round
    read that and everything newer."""

    def __init__(
        self, operations: Operations, counters: Counters, positions: torch.Tensor, *, num_kv_heads: int
    ) -> None:
        """positions [layers, max_num_reqs, width] int32: where the lists lie while the draft runs. num_kv_heads: of a
        draft layer, for the counts."""
        self.operations, self.counters = operations, counters
        self.num_kv_heads = num_kv_heads
        layers, rows, _ = positions.shape
        self._positions = positions
        self._kept = torch.empty((layers, rows), dtype=torch.int32, device=positions.device)
        self._rows = torch.arange(rows, device=positions.device)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, without `positions`, which the caller owns."""
        return self._kept.nbytes + self._rows.nbytes

    def begin(self, row_lens: torch.Tensor) -> None:
        """Start a round whose sampled tokens attend row_lens [R] int32 keys in step 0; 0 marks a row that nothing is
        chosen for."""
        self.row_lens = row_lens
        self.positions = self._positions[:, : row_lens.shape[0]]
        self.kept = self._kept[:, : row_lens.shape[0]]

    def of(self, layer: int) -> dict[str, torch.Tensor]:
        """A layer's list, as `draft_attention` and `accumulate_mass` take it."""
        return {"positions": self.positions[layer], "kept": self.kept[layer]}

    def choose(self, bits: torch.Tensor, num_steps: int) -> None:
        """End step 0: the lists of the round's num_steps - 1 later steps.

        bits [layers, R, 1, W] int32: this step's choice.
        """
        rows = self._rows[: self.row_lens.shape[0]]
        context = (self.row_lens - 1).clamp_(min=0)
        self.operations.build_positions(bits, rows, context, context, self.positions, self.kept)
        self._count(num_steps)

    def _count(self, num_steps: int) -> None:
        """Count what the round's steps would read without lists, and what they read."""
        entries = self.kept.shape[0] * self.num_kv_heads
        full, read = self.counters.on_device("draft_kv_full"), self.counters.on_device("draft_kv_read")
        first = self.row_lens.sum(dtype=torch.int64)
        full.add_(first, alpha=entries * num_steps)
        read.add_(first, alpha=entries)
        # Of the tokens that were there in step 0.
        listed = torch.where(self.kept >= 0, self.kept + 1, self.row_lens).sum(dtype=torch.int64)
        read.add_(listed, alpha=self.num_kv_heads * (num_steps - 1))
        # Each step after the first reads one token more than the one before it, listed or not.
        newer = (self.row_lens > 0).sum()
        for total in (full, read):
            total.add_(newer, alpha=entries * (num_steps * (num_steps - 1) // 2))
