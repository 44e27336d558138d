"""Selections by request slot, each tied to the context length it was made for."""

from __future__ import annotations

import torch

NO_SELECTION = -1


class SelectionStore:
    """One bitmask per (source, request slot, group), and the length it is good for.

    vLLM keeps a request in one *slot* for as long as it runs, whatever row of the batch it lands in, so the slot is the
    key. A slot is reused at once when its request finishes or is preempted. Two things keep a request from reading
    somebody else's selection: a row that is prefilling clears its slot (every new or resumed request starts with one),
    and a selection is only taken where its length equals the number of tokens the row has already computed.

    bits         [S, num_slots, G, W] int32: bit p % 32 of word p // 32 keeps token p.
    prefix_lens  [num_slots] int32: tokens in the context when the selection was made, NO_SELECTION if there is none.
    """

    def __init__(self, sources: int, slots: int, groups: int, max_model_len: int, device: torch.device) -> None:
        words = -(-max_model_len // 32)
        self.bits = torch.zeros((sources, slots, groups, words), dtype=torch.int32, device=device)
        self.prefix_lens = torch.full((slots,), NO_SELECTION, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        return self.bits.nbytes + self.prefix_lens.nbytes

    def put(self, slots: torch.Tensor, bits: torch.Tensor, prefix_lens: torch.Tensor) -> None:
        """Store the selections of a batch.

        slots [R] int64, bits [S, R, G, W], prefix_lens [R] int32; a length of 0 or less stores 'no selection'.
        """
        self.bits[:, slots] = bits
        self.prefix_lens[slots] = torch.where(prefix_lens > 0, prefix_lens, NO_SELECTION)

    def take(
        self, slots: torch.Tensor, computed: torch.Tensor, prefilling: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The usable selection of each row, clearing the slots of prefilling rows.

        slots [R] int64; computed [R] int32, tokens whose KV the row has before this step; prefilling [R] bool.
        Returns (prefix_lens, stored), both [R] int32: the length to prune to or NO_SELECTION, and what the slot held.
        """
        stored = self.prefix_lens[slots]
        usable = (stored == computed) & ~prefilling
        self.prefix_lens[slots] = torch.where(prefilling, NO_SELECTION, stored)
        return torch.where(usable, stored, NO_SELECTION), stored
