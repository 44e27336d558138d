"""From stored selections to the page tables of one step, in batch order."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from specattn_vllm.executors import Operations
from specattn_vllm.kernels.bookkeeping.contracts import READ_COUNTS
from specattn_vllm.selection.audit import Audit
from specattn_vllm.selection.clock import Clock
from specattn_vllm.selection.plan import PageTables, SparsePlan, short_rows
from specattn_vllm.selection.store import SelectionStore
from specattn_vllm.stats import Counters


class TableMaps(NamedTuple):
    """The stored selection from which each page table is made, for methods with one selection per KV head."""

    sources: torch.Tensor
    """[T] int32: index of the source in the store, for each table."""
    groups: torch.Tensor
    """[T, H] int32: index of the score group in the store, for each table and KV head."""

    @classmethod
    def of(cls, made_from: list[tuple[int, tuple[int, ...]]]) -> TableMaps:
        """Make the maps from the (source, groups) of each table, on the host."""
        sources, groups = zip(*made_from, strict=True)
        return cls(*(torch.tensor(m, dtype=torch.int32) for m in (sources, groups)))


class Pruner(PageTables):
    """Makes the page tables for the rows that verify, from block tables and stored selections.

    The table of a row without a usable selection lists all of its tokens. Only the device knows which rows these are,
    and the host never waits for that answer.
    """

    def __init__(
        self,
        store: SelectionStore,
        operations: Operations,
        counters: Counters,
        *,
        layer_sources: dict[str, int],
        num_layers: int,
        num_kv_heads: int,
        max_query_len: int,
        page_table: torch.Tensor,
        maps: TableMaps | None = None,
    ) -> None:
        """num_layers: number of all target layers. max_query_len: tokens of the longest verification, K + 1. Without
        maps there is one table for each source of the store."""
        tables = store.bits.shape[0] if maps is None else maps.sources.shape[0]
        super().__init__(operations, layer_sources, page_table[:tables])
        self.store = store
        self.counters = counters
        self.num_layers = num_layers
        self.num_kv_heads = num_kv_heads
        self.max_query_len = max_query_len
        self.maps = None if maps is None else TableMaps(*(part.to(self.device) for part in maps))
        self.audit: Audit | None = None
        self.clock = Clock(operations, counters.on_device("selection_ns"))
        layers_of = [list(layer_sources.values()).count(t) for t in range(tables)]
        self._layers_of = torch.tensor(layers_of, dtype=torch.int64, device=self.device)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, without the page tables and their maps, which the caller owns."""
        return self._kept.nbytes

    def prune(
        self,
        *,
        slots: torch.Tensor,
        slots_cpu: np.ndarray,
        prefilling: torch.Tensor,
        prefilling_cpu: torch.Tensor,
        query_start_loc: torch.Tensor,
        query_start_loc_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
    ) -> SparsePlan | None:
        """The plan of a step with R rows; None if the first row is longer than any verification.

        On the device: slots [R] int64, -1 for padded rows; prefilling [R] bool, query_start_loc [R+1] int32, seq_lens
        [R] int32, block_table [R, blocks] int32. On the host: the same slots as slots_cpu [R], prefilling_cpu [R] bool,
        query_start_loc_cpu [R+1].
        """
        prefix_lens, stored = self.store.take(self.operations, slots, query_start_loc, seq_lens, prefilling)
        rows, tokens, longest = short_rows(query_start_loc_cpu, self.max_query_len)
        self.counters.stage(prefill_rows=int(prefilling_cpu.sum()))
        # Tables are made even if all rows prefill: vLLM may run the last token of a prompt in the same CUDA graph as
        # verifications, and that graph always reads the tables.
        if rows == 0:
            return None
        slots, prefilling, seq_lens = slots[:rows], prefilling[:rows], seq_lens[:rows]
        prefix_lens, stored = prefix_lens[:rows], stored[:rows]
        with self.clock:
            page_table, kept = self.make(
                self.store.bits, slots, prefix_lens, seq_lens, block_table[:rows], self.maps or ()
            )
        if self.audit is not None:
            self.audit.choose(slots, prefix_lens, query_start_loc[:rows], seq_lens)
        verifies = ~prefilling_cpu[:rows] & (query_start_loc_cpu[1 : rows + 1] > query_start_loc_cpu[:rows])
        if verifying := int(verifies.sum()):
            self._count(verifying, slots, seq_lens, prefilling, prefix_lens, stored, kept)
            exact, small = self.store.dense_on_purpose(slots_cpu[:rows][verifies.numpy()])
            self.counters.stage(exact_rows=exact, small_batch_rows=small)
        return SparsePlan(rows, tokens, longest, page_table, kept, self.layer_sources)

    def _count(
        self,
        verifying: int,
        slots: torch.Tensor,
        seq_lens: torch.Tensor,
        prefilling: torch.Tensor,
        prefix_lens: torch.Tensor,
        stored: torch.Tensor,
        kept: torch.Tensor,
    ) -> None:
        counted = torch.empty(len(READ_COUNTS), dtype=torch.int64, device=self.device)
        self.operations.count_reads(
            slots,
            seq_lens,
            prefilling,
            prefix_lens,
            stored,
            kept,
            self._layers_of,
            self.num_kv_heads,
            self.num_layers,
            self.num_layers - len(self.layer_sources),
            counted,
        )
        self.counters.stage(verify_rows=verifying)
        self.counters.stage_vector(READ_COUNTS, counted)
