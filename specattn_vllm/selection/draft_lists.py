"""What the draft itself reads, with `sparse_draft`: a list of positions for each layer and row of the batch."""

from __future__ import annotations

import torch

from specattn_vllm.executors import Operations
from specattn_vllm.stats import Counters


class DraftLists:
    """Lists of positions in batch order, and the choices they are made of.

    A layer's choice is what its step 0 attended to; the lists of later steps hold that and everything newer. With
    `recalls`, choices are also kept by request slot, so that the step 0 of a later round can read them: its list is the
    choice and everything since. A list is built on the device and nothing waits for it, so a row that has no choice to
    recall is only marked as one that reads everything.

    Kept by slot, where the last slot is nobody's, as in `SelectionStore`:
    bits  [layers, num_slots + 1, 1, W] int32: the choices.
    lens  [num_slots + 1] int32: tokens in the context when they were made, -1 where there is none.
    """

    def __init__(
        self,
        operations: Operations,
        counters: Counters,
        positions: torch.Tensor,
        *,
        max_model_len: int,
        num_kv_heads: int,
        recalls: bool,
    ) -> None:
        """positions [layers, max_num_reqs, width] int32: where the lists lie while the draft runs. num_kv_heads: of a
        draft layer, for the counts."""
        self.operations, self.counters = operations, counters
        self.num_kv_heads, self.recalls = num_kv_heads, recalls
        layers, slots, _ = positions.shape
        device = positions.device
        self._positions = positions
        self._kept = torch.empty((layers, slots), dtype=torch.int32, device=device)
        self._rows = torch.arange(slots, device=device)
        slots = slots + 1 if recalls else 0
        self.bits = torch.zeros((layers, slots, 1, -(-max_model_len // 32)), dtype=torch.int32, device=device)
        self.lens = torch.full((slots,), -1, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, without `positions`, which the caller owns."""
        return sum(t.nbytes for t in (self._kept, self._rows, self.bits, self.lens))

    def forget(self, slot: int) -> None:
        """Another request enters a slot. Does not wait for the device."""
        if self.recalls:
            self.lens[slot].fill_(-1)

    def begin(self, slots: torch.Tensor, row_lens: torch.Tensor, *, recall: bool) -> None:
        """Start a round whose rows have slots [R] int64 (-1: nobody) and whose sampled tokens attend row_lens [R] int32
        keys in step 0; 0 marks a row that nothing is chosen for. With `recall`, build the lists of step 0."""
        self.slots, self.row_lens, self.recalled = slots, row_lens, recall
        self.context = (row_lens - 1).clamp_(min=0)
        self.positions = self._positions[:, : slots.shape[0]]
        self.kept = self._kept[:, : slots.shape[0]]
        if recall:
            self._build_recalled()

    def of(self, layer: int) -> dict[str, torch.Tensor]:
        """A layer's list, as `draft_attention` and `accumulate_mass` take it."""
        return {"positions": self.positions[layer], "kept": self.kept[layer]}

    def choose(self, bits: torch.Tensor, num_steps: int) -> None:
        """End step 0: the lists of the round's num_steps - 1 later steps, and what later rounds recall.

        bits [layers, R, 1, W] int32: this step's choice. A row that read a list keeps the choice that list was made of:
        chosen from what was left of it, it would shrink from round to round.
        """
        self._count(num_steps)
        rows = self._rows[: self.slots.shape[0]]
        if not self.recalls:
            self.operations.build_positions(bits, rows, self.context, self.context, self.positions, self.kept)
        else:
            slots = self.slots
            if self.recalled:
                slots = torch.where(self.kept[0] >= 0, -1, slots)
            self.bits[:, slots] = bits
            self.lens[slots] = torch.where(self.context > 0, self.context, -1)
            self._build_recalled()
        self._count_lists(num_steps - 1)

    def _build_recalled(self) -> None:
        """Lists of the choices kept by slot, up to the context of this round."""
        made_for = self.lens[self.slots]
        self.operations.build_positions(self.bits, self.slots, made_for, self.context, self.positions, self.kept)

    def _count(self, num_steps: int) -> None:
        """Count what the round's steps would read without lists, and what its step 0 has read."""
        entries = self.kept.shape[0] * self.num_kv_heads
        full, read = self.counters.on_device("draft_kv_full"), self.counters.on_device("draft_kv_read")
        first = self.row_lens.sum(dtype=torch.int64)
        full.add_(first, alpha=entries * num_steps)
        # Each step after the first reads one token more than the one before it, listed or not.
        rows = (self.row_lens > 0).sum()
        newer = num_steps * (num_steps - 1) // 2
        for total in (full, read):
            total.add_(rows, alpha=entries * newer)
        if self.recalled:
            self._count_lists(1)
        else:
            read.add_(first, alpha=entries)

    def _count_lists(self, num_steps: int) -> None:
        """Count what so many steps read through the lists, of the tokens that were there in step 0."""
        read = torch.where(self.kept >= 0, self.kept + 1, self.row_lens).sum(dtype=torch.int64)
        self.counters.on_device("draft_kv_read").add_(read, alpha=self.num_kv_heads * num_steps)
