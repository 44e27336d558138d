"""What stands for the tokens that a verification does not read: as many of the context's mean key and value.

What a selection leaves out is most of the context, and each token of it weighs next to nothing; together they often
hold a twentieth of a layer's attention, and more than half in layers that attend widely. Attention over the selection
alone gives their weight to the tokens that were read. The mean key and value of a request cost nothing to read, and
counted as often as there are tokens that were left out they put most of that right (`kernels/sparse_attention.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from specattn_vllm.executors import Operations
from specattn_vllm.kernels.unread_contracts import LONGEST, Mean

if TYPE_CHECKING:
    from specattn_vllm.backend.impl import SpecAttnImpl
    from specattn_vllm.backend.metadata import SpecAttnMetadata


PARTS = 4096
"""Parts of prompts that are summed at the same time and added up afterwards, 1 KiB each for a KV head of size 128. What
is beyond them, of 256 requests that all find more than 16k tokens in the prefix cache, is left to later steps."""


class Prompts(NamedTuple):
    """Rows of a step from `first_row` on: slots [P] int64, -1 where a row verifies, and lens [P] int32."""

    first_row: int
    slots: torch.Tensor
    lens: torch.Tensor


class Unread:
    """Sums of keys and values by request slot, of each target layer that reads a selection.

    `forget` when a request is given a slot; for a step `begin` outside of any graph, then of each layer
    `LayerUnread.take_in`, which does something where prompts are computed, and that is never under CUDA graph capture,
    and one attention with `LayerUnread.mean`, which may be. Nothing waits for the device and every buffer of the mean
    lasts.

    sums    [A, num_slots + 1, H, 2D] float32, summed [A, num_slots + 1, H] int32: of how many positions. The last slot
            is nobody's, as in `SelectionStore`.
    slots   [max_num_reqs] int64, lens [max_num_reqs] int32: of the step's verifications, what their requests have in
            the cache for good; slot -1 and any length of another row.
    """

    @classmethod
    def of(cls, impl: SpecAttnImpl, operations: Operations, **size) -> Unread:
        """For layers like the one of `impl`."""
        return cls(operations, num_kv_heads=impl.num_kv_heads, head_size=impl.head_size, **size)

    def __init__(
        self,
        operations: Operations,
        *,
        layers: int,
        num_kv_heads: int,
        head_size: int,
        max_num_reqs: int,
        device: torch.device,
    ) -> None:
        self.operations = operations
        shape = (layers, max_num_reqs + 1, num_kv_heads)
        self.sums = torch.zeros((*shape, 2 * head_size), dtype=torch.float32, device=device)
        self.summed = torch.zeros(shape, dtype=torch.int32, device=device)
        self.slots = torch.full((max_num_reqs,), -1, dtype=torch.int64, device=device)
        self.lens = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        self.prompts: Prompts | None = None
        """Where the step computes some."""

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.sums, self.summed, self.slots, self.lens))

    def forget(self, slot: int) -> None:
        """A request, new or resumed, is given a slot."""
        self.summed[:, slot].fill_(0)

    def begin(
        self, slots: torch.Tensor, prefilling: torch.Tensor, prefills: bool, query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor, rows: int,
    ) -> None:  # fmt: skip
        """Announce a step of the target, of which the first `rows` rows are no longer than a verification.

        slots [R] int64, -1 for rows that only fill a graph's batch; prefilling [R] bool, and on the host whether any of
        the longer rows is; query_start_loc [R+1] and seq_lens [R] int32. The tokens of a short row may be none of its
        prompt: vLLM pads one that has a token left to a verification's length. Verifications take them in.
        """
        self.slots.fill_(-1)
        self.slots[:rows] = torch.where(prefilling[:rows], -1, slots[:rows])
        self.lens[:rows] = seq_lens[:rows] - query_start_loc[: rows + 1].diff()
        self.prompts = None
        if prefills:
            self.prompts = Prompts(rows, torch.where(prefilling[rows:], slots[rows:], -1), seq_lens[rows:])


class LayerUnread:
    """One layer's part."""

    def __init__(self, unread: Unread, index: int) -> None:
        self._unread = unread
        self._index = index

    def take_in(self, kv_cache: torch.Tensor, md: SpecAttnMetadata) -> None:
        """Sum what the step adds to prompts, and what they found in the prefix cache; their keys are in the cache."""
        unread = self._unread
        if unread.prompts is not None:
            first_row, slots, lens = unread.prompts
            sums, summed = unread.sums[self._index], unread.summed[self._index]
            table = md.block_table[first_row : first_row + len(slots)]
            longest = min(md.max_seq_len, max(PARTS // len(slots), 1) * LONGEST)
            unread.operations.sum_context(kv_cache, table, slots, lens, sums, summed, longest)

    def mean(self, md: SpecAttnMetadata) -> Mean:
        """What attention over the selections of the plan's rows is given for what these leave out."""
        unread, rows = self._unread, md.sparse.num_rows
        return Mean(
            block_table=md.block_table[:rows],
            lens=unread.lens[:rows],
            seq_lens=md.seq_lens[:rows],
            slots=unread.slots[:rows],
            sums=unread.sums[self._index],
            summed=unread.summed[self._index],
        )
