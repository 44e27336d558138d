"""Selections by request slot, each tied to the context length it was made for."""

from __future__ import annotations

import numpy as np
import torch

from specattn_vllm.executors import Operations
from specattn_vllm.kernels.bookkeeping.contracts import NO_SELECTION


class SelectionStore:
    """One bitmask per (source, request slot, group), and the context length for which it was made.

    vLLM keeps a request in one *slot* while it runs, in whatever row of the batch it is, so the slot is the key. A slot
    is reused at once when its request finishes or is preempted. Two rules keep a request from reading the selection of
    another request: a row that is prefilling clears its slot (every new or resumed request starts with a prefill), and
    a selection is only used if its length equals the number of tokens that the row has already computed.

    bits         [S, num_slots + 1, G, W] int32: bit p % 32 of word p // 32 keeps token p.
    prefix_lens  [num_slots + 1] int32: tokens in the context when the selection was made, or NO_SELECTION.
    exact        [num_slots + 1] bool: requests that asked for exact verification; nothing is selected for them.

    The last slot belongs to no request. Padded rows have slot -1, so `put` and `clear` write to it for them.
    """

    def __init__(self, sources: int, slots: int, groups: int, max_model_len: int, device: torch.device) -> None:
        words = -(-max_model_len // 32)
        self.bits = torch.zeros((sources, slots + 1, groups, words), dtype=torch.int32, device=device)
        self.prefix_lens = torch.full((slots + 1,), NO_SELECTION, dtype=torch.int32, device=device)
        self.exact = torch.zeros(slots + 1, dtype=torch.bool, device=device)
        self._exact_on_host = np.zeros(slots, dtype=bool)
        self._small_on_host = np.zeros(slots, dtype=bool)

    @property
    def nbytes(self) -> int:
        return self.bits.nbytes + self.prefix_lens.nbytes + self.exact.nbytes

    def hold(self, slot: int, exact: bool) -> None:
        """A request enters a slot. `exact`: whether it asked for exactness. Does not wait for the device."""
        if self._exact_on_host[slot] != exact:
            self._exact_on_host[slot] = exact
            self.exact[slot].fill_(exact)

    def note_small_batch(self, slots: np.ndarray, small: bool) -> None:
        """Note whether rounds store no selections for requests in slots [R], because their batch is small. This is only
        noted on the host, to tell why a row is dense."""
        self._small_on_host[slots] = small

    def dense_on_purpose(self, slots: np.ndarray) -> tuple[int, int]:
        """How many of the requests in slots [R] have no selection because they asked for exactness, and how many others
        because their batch was small. Only uses the host's notes."""
        exact = self._exact_on_host[slots]
        return int(exact.sum()), int((self._small_on_host[slots] & ~exact).sum())

    def put(self, slots: torch.Tensor, bits: torch.Tensor, prefix_lens: torch.Tensor) -> None:
        """Store the selections of a batch.

        slots [R] int64, bits [S, R, G, W], prefix_lens [R] int32; a length of 0 or less is stored as NO_SELECTION.
        """
        self.bits[:, slots] = bits
        self.prefix_lens[slots] = torch.where(prefix_lens > 0, prefix_lens, NO_SELECTION)

    def clear(self, slots: torch.Tensor) -> None:
        """Forget the selections of slots [R] int64: the next step of these requests is dense."""
        # Assigning a number instead would copy it from the host and wait for the copy.
        self.prefix_lens.index_fill_(0, slots, NO_SELECTION)

    def take(
        self,
        operations: Operations,
        slots: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        prefilling: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the usable selection of each row, and clear the slots of prefilling rows.

        slots [R] int64; query_start_loc [R+1] int32; seq_lens [R] int32; prefilling [R] bool. The tokens that a row has
        already computed are its seq_len minus its query length. Padded rows take nothing and clear nothing. Returns
        (prefix_lens, stored), both [R] int32: the length of the usable selection or NO_SELECTION, and the length that
        the slot held.
        """
        usable, stored = torch.empty_like(seq_lens), torch.empty_like(seq_lens)
        operations.take_selections(slots, query_start_loc, seq_lens, prefilling, self.prefix_lens, usable, stored)
        return usable, stored
