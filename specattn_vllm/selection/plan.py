"""The plan of a step: which KV entries each layer reads, for methods that choose them before the step."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
