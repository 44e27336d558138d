"""Selections by request slot, each tied to the context length it was made for."""

from __future__ import annotations

import numpy as np
import torch

from specattn_vllm.executors import Operations
from specattn_vllm.kernels.bookkeeping.contracts import NO_SELECTION


class SelectionStore:
    """One bitmask per (source, request slot, group), and the length it is good for.

    vLLM keeps a request in one *slot* for as long as it runs, whatever row of the batch it lands in, so the slot is the
    key. A slot is reused at once when its request finishes or is preempted. Two things keep a request from reading
    somebody else's selection: a row that is prefilling clears its slot (every new or resumed request starts with one),
    and a selection is only taken where its length equals the number of tokens the row has already computed.

    bits         [S, num_slots + 1, G, W] int32: bit p % 32 of word p // 32 keeps token p.
    prefix_lens  [num_slots + 1] int32: tokens in the context when the selection was made, or NO_SELECTION.
    exact        [num_slots + 1] bool: requests that asked for exact verification, for which nothing is selected.

    The last slot is nobody's: what is put or cleared for a padded row, whose slot is -1, goes there.
    """

    def __init__(self, sources: int, slots: int, groups: int, max_model_len: int, device: torch.device) -> None:
        words = -(-max_model_len // 32)
        self.bits = torch.zeros((sources, slots + 1, groups, words), dtype=torch.int32, device=device)
        self.prefix_lens = torch.full((slots + 1,), NO_SELECTION, dtype=torch.int32, device=device)
        self.exact = torch.zeros(slots + 1, dtype=torch.bool, device=device)
        self._exact_on_host = np.zeros(slots, dtype=bool)
        self._aside_on_host = np.zeros(slots, dtype=bool)

    @property
    def nbytes(self) -> int:
        return self.bits.nbytes + self.prefix_lens.nbytes + self.exact.nbytes

    def hold(self, slot: int, exact: bool) -> None:
        """A request enters a slot; from then on it is exact or not. Does not wait for the device."""
        if self._exact_on_host[slot] != exact:
            self._exact_on_host[slot] = exact
            self.exact[slot].fill_(exact)

    def step_aside(self, slots: np.ndarray, aside: bool) -> None:
        """A round stores nothing for requests in slots [R], because their batch is small, or stores something again. On
        the host alone, to say why a row is dense."""
        self._aside_on_host[slots] = aside

    def dense_on_purpose(self, slots: np.ndarray) -> tuple[int, int]:
        """How many of the requests in slots [R] have no selection because they asked for exactness, and how many others
        because their batch was small. On the host alone."""
        exact = self._exact_on_host[slots]
        return int(exact.sum()), int((self._aside_on_host[slots] & ~exact).sum())

    def put(self, slots: torch.Tensor, bits: torch.Tensor, prefix_lens: torch.Tensor) -> None:
        """Store the selections of a batch.

        slots [R] int64, bits [S, R, G, W], prefix_lens [R] int32; a length of 0 or less stores 'no selection'.
        """
        self.bits[:, slots] = bits
        self.prefix_lens[slots] = torch.where(prefix_lens > 0, prefix_lens, NO_SELECTION)

    def clear(self, slots: torch.Tensor) -> None:
        """Forget the selections of slots [R] int64: the next step of those requests reads everything."""
        # Not by an assignment of a number, which brings it from the host and waits for that.
        self.prefix_lens.index_fill_(0, slots, NO_SELECTION)

    def take(
        self,
        operations: Operations,
        slots: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        prefilling: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The usable selection of each row, clearing the slots of prefilling rows.

        slots [R] int64; query_start_loc [R+1] int32 and seq_lens [R] int32, of which the tokens whose KV a row has
        before this step are the difference; prefilling [R] bool. A padded row takes nothing and clears nothing.
        Returns (prefix_lens, stored), both [R] int32: the length to prune to or NO_SELECTION, and what the slot held.
        """
        usable, stored = torch.empty_like(seq_lens), torch.empty_like(seq_lens)
        operations.take_selections(slots, query_start_loc, seq_lens, prefilling, self.prefix_lens, usable, stored)
        return usable, stored
