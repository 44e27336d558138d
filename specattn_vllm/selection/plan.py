"""The plan of a step: which KV entries each layer reads, for methods that choose them before the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from specattn_vllm.executors import Operations


def short_rows(query_start_loc_cpu: torch.Tensor, most: int) -> tuple[int, int, int]:
    """The rows before the first row of more than `most` tokens: their number, their tokens, and the tokens of the
    longest of them, at least 1. query_start_loc_cpu [R+1] on the host. vLLM puts rows with drafts first and sorts the
    other rows by length, so these include all rows past their prompt, and short chunks of prompts."""
    lengths = query_start_loc_cpu.diff()
    long = (lengths > most).nonzero()
    rows = int(long[0, 0]) if long.numel() else lengths.shape[0]
    longest = int(lengths[:rows].max()) if rows else 1
    return rows, int(query_start_loc_cpu[rows]), max(longest, 1)


@dataclass
class SparsePlan:
    """Page tables of a step's short rows. These are rows 0..num_rows-1 of the batch and include all that verify.

    page_table [T, R, G, width] int32: ids into the head-folded view of a layer's cache (`pages.py`), for the first KV
    head if all heads share a selection (G = 1), else for each head (G = H). kept [T, R, G] int32: number of ids. Both
    have the same addresses in every step, so a captured CUDA graph reads the tables of the step in which it is
    replayed. layer_sources: vLLM's layer name -> index in T, for the target layers that read a selection.
    """

    num_rows: int
    num_tokens: int
    max_query_len: int
    page_table: torch.Tensor
    kept: torch.Tensor
    layer_sources: dict[str, int]


class PageTables:
    """Page tables in memory that keeps its address, made from bits of selected tokens."""

    def __init__(self, operations: Operations, layer_sources: dict[str, int], page_table: torch.Tensor) -> None:
        """layer_sources: vLLM's name of each target layer that reads a selection -> its table. page_table
        [T, max_num_reqs, G, width] int32: memory for the tables, which the caller owns."""
        self.operations = operations
        self.layer_sources = layer_sources
        self.device = page_table.device
        self._page_table = page_table
        self._kept = torch.zeros(page_table.shape[:3], dtype=torch.int32, device=page_table.device)

    def attach(self, block_size: int, page_strides: Callable[[], tuple[int, int, int]]) -> None:
        """Set the layout of the cache. page_strides is called whenever tables are made, because vLLM allocates the
        cache after this call, and twice if it profiles CUDA graphs."""
        self.block_size = block_size
        self.page_strides = page_strides

    def make(
        self,
        bits: torch.Tensor,
        slots: torch.Tensor,
        prefix_lens: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        maps: Sequence[torch.Tensor] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the tables of R rows; arguments as in `build_page_tables`. Returns page_table [T, R, G, width] and kept
        [T, R, G] int32."""
        rows, width = seq_lens.shape[0], self._page_table.shape[3]
        # A table of blocks is only as wide as the blocks of the longest sequence: some executors split work by width.
        if self.operations.granularity == "block":
            width = -(-width // self.block_size)
        page_table, kept = self._page_table[:, :rows, :, :width], self._kept[:, :rows]
        self.operations.build_page_tables(
            bits,
            slots,
            prefix_lens,
            seq_lens,
            block_table,
            self.block_size,
            self.page_strides(),
            page_table,
            kept,
            *maps,
        )
        return page_table, kept
