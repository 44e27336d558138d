"""From stored selections to the page tables of one step, in batch order."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from specattn_vllm.executors import Operations
from specattn_vllm.kernels.bookkeeping.contracts import READ_COUNTS
from specattn_vllm.selection.audit import Audit
from specattn_vllm.selection.plan import SparsePlan
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


class Pruner:
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
        """layer_sources: target layer name -> table. num_layers: number of all target layers. max_query_len: tokens of
        the longest verification, K + 1. page_table [T, max_num_reqs, G, width] int32: memory for the tables. Without
        maps there is one table for each source and group of the store."""
        self.store = store
        self.operations = operations
        self.counters = counters
        self.layer_sources = layer_sources
        self.num_layers = num_layers
        self.num_kv_heads = num_kv_heads
        self.max_query_len = max_query_len
        self.maps = None if maps is None else TableMaps(*(part.to(page_table.device) for part in maps))
        self.audit: Audit | None = None
        tables, groups = (store.bits.shape[0], store.bits.shape[2]) if maps is None else maps.groups.shape
        self.device = page_table.device
        self._page_table = page_table[:tables]
        self._kept = torch.zeros((tables, page_table.shape[1], groups), dtype=torch.int32, device=self.device)
        layers_of = [list(layer_sources.values()).count(t) for t in range(tables)]
        self._layers_of = torch.tensor(layers_of, dtype=torch.int64, device=self.device)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, without the page tables and their maps, which the caller owns."""
        return self._kept.nbytes

    def attach(self, block_size: int, page_strides: Callable[[], tuple[int, int, int]]) -> None:
        """Set the layout of the cache. page_strides is called in each step, because vLLM allocates the cache after this
        call, and twice if it profiles CUDA graphs."""
        self.block_size = block_size
        self.page_strides = page_strides

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
        rows = self._short_rows(query_start_loc_cpu)
        self.counters.stage(prefill_rows=int(prefilling_cpu.sum()))
        # Tables are made even if all rows prefill: vLLM may run the last token of a prompt in the same CUDA graph as
        # verifications, and that graph always reads the tables.
        if rows == 0:
            return None
        slots, prefilling, seq_lens = slots[:rows], prefilling[:rows], seq_lens[:rows]
        prefix_lens, stored = prefix_lens[:rows], stored[:rows]
        # A table of blocks is only as wide as the blocks of the longest sequence: some executors split work by width.
        width = self._page_table.shape[3]
        if self.operations.granularity == "block":
            width = -(-width // self.block_size)
        page_table, kept = self._page_table[:, :rows, :, :width], self._kept[:, :rows]
        self.operations.build_page_tables(
            self.store.bits,
            slots,
            prefix_lens,
            seq_lens,
            block_table[:rows],
            self.block_size,
            self.page_strides(),
            page_table,
            kept,
            *(() if self.maps is None else self.maps),
        )
        if self.audit is not None:
            self.audit.choose(slots, prefix_lens, query_start_loc[:rows], seq_lens)
        verifies = ~prefilling_cpu[:rows] & (query_start_loc_cpu[1 : rows + 1] > query_start_loc_cpu[:rows])
        if verifying := int(verifies.sum()):
            self._count(verifying, slots, seq_lens, prefilling, prefix_lens, stored, kept)
            exact, small = self.store.dense_on_purpose(slots_cpu[:rows][verifies.numpy()])
            self.counters.stage(exact_rows=exact, small_batch_rows=small)
        starts = query_start_loc_cpu[: rows + 1]
        return SparsePlan(
            num_rows=rows,
            num_tokens=int(starts[rows]),
            max_query_len=int((starts[1:] - starts[:-1]).max()),
            page_table=page_table,
            kept=kept,
            layer_sources=self.layer_sources,
        )

    def _short_rows(self, query_start_loc_cpu: torch.Tensor) -> int:
        """Number of rows before the first row that is longer than a verification.

        vLLM puts rows with drafts first and sorts the other rows by length, so these include every verification. Short
        prefill chunks among them get a full table, as any row without a selection.
        """
        long = (query_start_loc_cpu[1:] - query_start_loc_cpu[:-1] > self.max_query_len).nonzero()
        return int(long[0, 0]) if long.numel() else query_start_loc_cpu.shape[0] - 1

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
