"""What attention reads in a step where a plan of all layers is made before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class SparsePlan:
    """Page tables of a step's short rows, which are rows 0..num_rows-1 of the batch and hold all that verify.

    page_table [T, R, G, width] int32, kept [T, R, G] int32: ids into the head-folded view of a layer's cache, those of
    the first KV head where all heads share a selection (G = 1), else those of each (G = H). Both lie in buffers that
    last, at the same addresses for every step, so a captured graph reads the tables of the step it is replayed in.
    layer_sources: vLLM layer name -> T index, for the target layers that read a selection.
    """

    num_rows: int
    num_tokens: int
    max_query_len: int
    page_table: torch.Tensor
    kept: torch.Tensor
    layer_sources: dict[str, int]
