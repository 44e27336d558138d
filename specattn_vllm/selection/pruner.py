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
    """Pruned page tables of a step's verification rows, which are rows 0..num_rows-1 of the batch.

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
        block_size: int,
        page_strides: Callable[[], tuple[int, int, int]],
        max_num_reqs: int,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        """layer_sources: target layer name -> source; num_layers: target layers in all; page_strides: asked at each
        step, because vLLM allocates the cache after this object and may allocate it twice."""
        self.store = store
        self.operations = operations
        self.counters = counters
        self.layer_sources = layer_sources
        self.num_layers = num_layers
        self.block_size = block_size
        self.page_strides = page_strides
        self.device = device
        sources = store.bits.shape[0]
        # A whole number of blocks, so that a table row is never shorter than what the block table can address.
        self.width = -(-max_model_len // block_size) * block_size
        shape = (sources, max_num_reqs, num_kv_heads)
        self._page_table = torch.empty(shape[0] * shape[1] * shape[2] * self.width, dtype=torch.int32, device=device)
        self._kept = torch.zeros(shape[0] * shape[1] * shape[2], dtype=torch.int32, device=device)
        self.num_kv_heads = num_kv_heads
        layers_of = [list(layer_sources.values()).count(s) for s in range(sources)]
        self._layers_of = torch.tensor(layers_of, dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        return self._page_table.nbytes + self._kept.nbytes

    def prune(
        self,
        *,
        slots: torch.Tensor,
        is_prefilling: torch.Tensor,
        query_start_loc: torch.Tensor,
        query_start_loc_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
    ) -> SparsePlan | None:
        """The plan of a step with R rows, None if none of its leading rows verifies.

        On the host: slots [R] int64, is_prefilling [R] bool, query_start_loc_cpu [R+1]. On the device:
        query_start_loc [R+1] int32, seq_lens [R] int32, block_table [R, blocks] int32.
        """
        slots = slots.to(self.device, torch.int64, non_blocking=True)
        prefilling = is_prefilling.to(self.device, non_blocking=True)
        query_lens = query_start_loc[1:] - query_start_loc[:-1]
        prefix_lens, stored = self.store.take(slots, seq_lens - query_lens, prefilling)
        rows = _leading_rows(is_prefilling)
        self.counters.stage(prefill_rows=int(is_prefilling.sum()), dense_trailing_rows=_trailing(is_prefilling, rows))
        if rows == 0:
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
        self._count(rows, prefix_lens, stored, seq_lens, kept)
        starts = query_start_loc_cpu[: rows + 1]
        return SparsePlan(
            num_rows=rows,
            num_tokens=int(starts[rows]),
            max_query_len=int((starts[1:] - starts[:-1]).max()),
            page_table=page_table,
            kept=kept,
            layer_sources=self.layer_sources,
        )

    def _count(self, rows: int, prefix_lens, stored, seq_lens, kept) -> None:
        sparse = prefix_lens != NO_SELECTION
        read = (kept.sum(dim=(1, 2), dtype=torch.int64) * self._layers_of).sum()
        everything = seq_lens.sum(dtype=torch.int64) * self.num_kv_heads
        dense_layers = self.num_layers - len(self.layer_sources)
        self.counters.stage(
            verify_rows=rows,
            sparse_rows=sparse.sum(),
            no_selection_rows=(stored == NO_SELECTION).sum(),
            stale_rows=((stored != NO_SELECTION) & ~sparse).sum(),
            kv_read=read + everything * dense_layers,
            kv_full=everything * self.num_layers,
        )


def _leading_rows(is_prefilling: torch.Tensor) -> int:
    """Rows before the first prefilling one. vLLM puts verification first; the exception is in `_trailing`."""
    prefilling = is_prefilling.nonzero()
    return int(prefilling[0, 0]) if prefilling.numel() else is_prefilling.shape[0]


def _trailing(is_prefilling: torch.Tensor, rows: int) -> int:
    """Verification rows behind a prefilling one, which read everything: vLLM sorts a resumed request that has one token
    left to compute among the verification rows, and attention splits the batch in two parts only."""
    return int((~is_prefilling[rows:]).sum())
