"""Page tables that the target reads while it drafts for itself."""

from __future__ import annotations

import torch

from specattn_vllm.executors import Operations
from specattn_vllm.selection.plan import PageTables, SparsePlan


class DraftTables(PageTables):
    """One table per source and row for a whole round, and the number of its entries that each draft step reads.

    The table is made once per round, for the context length of the round's last step. New tokens are at its end, so an
    earlier step reads the same table without the last entries.
    """

    def __init__(
        self, operations: Operations, layer_sources: dict[str, int], page_table: torch.Tensor, nbytes: int
    ) -> None:
        """page_table [S, max_num_reqs, 1, width]: its memory may have another use before. nbytes: bytes of it to count
        as this object's, 0 if they are counted elsewhere."""
        super().__init__(operations, layer_sources, page_table)
        self.nbytes = nbytes
        self._rows = torch.arange(page_table.shape[1], device=page_table.device)

    def build(
        self, bits: torch.Tensor, prefix_lens: torch.Tensor, step_lens: torch.Tensor, block_table: torch.Tensor
    ) -> torch.Tensor:
        """Make the tables of a round.

        bits [S, R, 1, W] int32 with any strides; prefix_lens [R] int32: all later positions are kept; step_lens [K, R]
        int32: context length in each step, with the step's own token, 0 for rows that read nothing; block_table
        [R, blocks] int32. Returns kept [K, S, R, 1] int32: entries that each step reads.
        """
        rows = self._rows[: prefix_lens.shape[0]]
        self.tables, kept = self.make(bits, rows, prefix_lens, step_lens[-1], block_table)
        missing = step_lens[-1] - step_lens
        self.kept = (kept - missing[:, None, :, None]).clamp_(min=0)
        return self.kept

    def plan(self, step: int) -> SparsePlan:
        """The plan of draft step `step` of the round, with one token per row."""
        rows = self.kept.shape[2]
        return SparsePlan(rows, rows, 1, self.tables, self.kept[step], self.layer_sources)
