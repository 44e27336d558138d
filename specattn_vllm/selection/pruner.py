"""From stored selections to the page tables of one step, in batch order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from specattn_vllm.executors import Operations
from specattn_vllm.selection.store import NO_SELECTION, SelectionStore
from specattn_vllm.stats import Counters


@dataclass
class SparsePlan:
    """Page tables of a step's short rows, which are rows 0..num_rows-1 of the batch and hold all that verify.

    page_table [S, R, H, width] int32, kept [S, R, H] int32: ids into the head-folded view of a layer's cache.
    layer_sources: vLLM layer name -> S index, for the target layers that read a selection.
    """

    num_rows: int
    num_tokens: int
    max_query_len: int
    page_table: torch.Tensor
    kept: torch.Tensor
    layer_sources: dict[str, int]


class Pruner:
    """Prunes block tables for the rows that verify; owns the page tables that attention reads.

    A row without a usable selection keeps all of its tokens in the table: which rows those are is only known on the
    device, and the host never waits to find out.
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
        max_num_reqs: int,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        """layer_sources: target layer name -> source; num_layers: target layers in all; max_query_len: tokens of the
        longest verification, K + 1."""
        self.store = store
        self.operations = operations
        self.counters = counters
        self.layer_sources = layer_sources
        self.num_layers = num_layers
        self.num_kv_heads = num_kv_heads
        self.max_query_len = max_query_len
        self.width = max_model_len
        self.device = device
        sources = store.bits.shape[0]
        entries = sources * max_num_reqs * num_kv_heads
        # Flat, so that any number of rows is a contiguous [S, R, H, ...] block.
        self._page_table = torch.empty(entries * self.width, dtype=torch.int32, device=device)
        self._kept = torch.zeros(entries, dtype=torch.int32, device=device)
        layers_of = [list(layer_sources.values()).count(s) for s in range(sources)]
        self._layers_of = torch.tensor(layers_of, dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        return self._page_table.nbytes + self._kept.nbytes

    def attach(self, block_size: int, page_strides: Callable[[], tuple[int, int, int]]) -> None:
        """Tell how the cache is laid out. page_strides is asked at each step: vLLM allocates the cache after this, and
        when it profiles CUDA graphs, twice."""
        self.block_size = block_size
        self.page_strides = page_strides

    def prune(
        self,
        *,
        slots: torch.Tensor,
        prefilling: torch.Tensor,
        prefilling_cpu: torch.Tensor,
        query_start_loc: torch.Tensor,
        query_start_loc_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
    ) -> SparsePlan | None:
        """The plan of a step with R rows, None if none of them verifies.

        On the device: slots [R] int64, prefilling [R] bool, query_start_loc [R+1] int32, seq_lens [R] int32,
        block_table [R, blocks] int32. On the host: prefilling_cpu [R] bool, query_start_loc_cpu [R+1].
        """
        query_lens = query_start_loc[1:] - query_start_loc[:-1]
        prefix_lens, stored = self.store.take(slots, seq_lens - query_lens, prefilling)
        rows = self._short_rows(query_start_loc_cpu)
        verifying = int((~prefilling_cpu[:rows]).sum())
        self.counters.stage(prefill_rows=int(prefilling_cpu.sum()))
        if verifying == 0:
            return None
        prefix_lens, stored, seq_lens = prefix_lens[:rows], stored[:rows], seq_lens[:rows]
        sources, heads = self.store.bits.shape[0], self.num_kv_heads
        entries = sources * rows * heads
        page_table = self._page_table[: entries * self.width].view(sources, rows, heads, self.width)
        kept = self._kept[:entries].view(sources, rows, heads)
        self.operations.build_page_tables(
            self.store.bits,
            slots[:rows],
            prefix_lens,
            seq_lens,
            block_table[:rows],
            self.block_size,
            self.page_strides(),
            page_table,
            kept,
        )
        self._count(verifying, ~prefilling[:rows], prefix_lens, stored, seq_lens, kept)
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
        """Rows before the first that is longer than a verification.

        vLLM puts rows with drafts first and sorts the rest by length, so these hold every verification; short prefill
        chunks among them keep their whole table like any row without a selection.
        """
        long = (query_start_loc_cpu[1:] - query_start_loc_cpu[:-1] > self.max_query_len).nonzero()
        return int(long[0, 0]) if long.numel() else query_start_loc_cpu.shape[0] - 1

    def _count(self, verifying: int, verifies, prefix_lens, stored, seq_lens, kept) -> None:
        sparse = prefix_lens != NO_SELECTION
        per_row = (kept.sum(dim=2, dtype=torch.int64) * self._layers_of[:, None]).sum(dim=0)
        everything = torch.where(verifies, seq_lens, 0).sum(dtype=torch.int64) * self.num_kv_heads
        dense_layers = self.num_layers - len(self.layer_sources)
        self.counters.stage(
            verify_rows=verifying,
            sparse_rows=sparse.sum(),
            no_selection_rows=(verifies & (stored == NO_SELECTION)).sum(),
            stale_rows=(verifies & (stored != NO_SELECTION) & ~sparse).sum(),
            kv_read=torch.where(verifies, per_row, 0).sum() + everything * dense_layers,
            kv_full=everything * self.num_layers,
        )
