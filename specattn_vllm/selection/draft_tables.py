"""Page tables that the target reads while it drafts for itself."""

from __future__ import annotations

from collections.abc import Callable

import torch

from specattn_vllm.executors import Operations
from specattn_vllm.selection.plan import SparsePlan


class DraftTables:
    """One table per source and row for a whole round, and the number of its entries that each draft step reads.

    The table is made once per round, for the context length of the round's last step. New tokens are at its end, so an
    earlier step reads the same table without the last entries.
    """

    def __init__(
        self, operations: Operations, layer_sources: dict[str, int], page_table: torch.Tensor, nbytes: int
    ) -> None:
        """layer_sources: vLLM's name of each target layer -> its table. page_table [S, max_num_reqs, 1, width] int32:
        memory for the tables, which may have another use before. nbytes: bytes of it to count as this object's, 0 if
        they are counted elsewhere."""
        self.operations = operations
        self.layer_sources = layer_sources
        self.nbytes = nbytes
        self._page_table = page_table
        self._kept = torch.zeros(page_table.shape[:3], dtype=torch.int32, device=page_table.device)
        self._rows = torch.arange(page_table.shape[1], device=page_table.device)

    def attach(self, block_size: int, page_strides: Callable[[], tuple[int, int, int]]) -> None:
        """Set the layout of the cache. page_strides is called in each round, because vLLM allocates the cache later."""
        self.block_size = block_size
        self.page_strides = page_strides

    def build(
        self, bits: torch.Tensor, prefix_lens: torch.Tensor, step_lens: torch.Tensor, block_table: torch.Tensor
    ) -> torch.Tensor:
        """Make the tables of a round.

        bits [S, R, 1, W] int32 with any strides; prefix_lens [R] int32: all later positions are kept; step_lens [K, R]
        int32: context length in each step, with the step's own token, 0 for rows that read nothing; block_table
        [R, blocks] int32. Returns kept [K, S, R, 1] int32: entries that each step reads.
        """
        rows = prefix_lens.shape[0]
        self.width = self._page_table.shape[3]
        if self.operations.granularity == "block":
            self.width = -(-self.width // self.block_size)
        kept = self._kept[:, :rows]
        self.operations.build_page_tables(
            bits,
            self._rows[:rows],
            prefix_lens,
            step_lens[-1],
            block_table,
            self.block_size,
            self.page_strides(),
            self._page_table[:, :rows, :, : self.width],
            kept,
        )
        missing = step_lens[-1] - step_lens
        self.kept = (kept - missing[:, None, :, None]).clamp_(min=0)
        return self.kept

    def plan(self, step: int) -> SparsePlan:
        """The plan of draft step `step` of the round, with one token per row."""
        rows = self.kept.shape[2]
        return SparsePlan(
            num_rows=rows,
            num_tokens=rows,
            max_query_len=1,
            page_table=self._page_table[:, :rows, :, : self.width],
            kept=self.kept[step],
            layer_sources=self.layer_sources,
        )
