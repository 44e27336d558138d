"""What all layers of a model share while they choose: options, buffers, and the step at hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from specattn_vllm.executors import Operations
from specattn_vllm.kernels.sketch.contracts import BINS, CHUNK, Budget
from specattn_vllm.kernels.sketch.layout import SketchLayout
from specattn_vllm.sketch.counting import StepCounts
from specattn_vllm.sketch.rotation import rotation
from specattn_vllm.stats import Counters

LEAST_ROWS = 16  # the narrowest product of matrices


@dataclass(frozen=True)
class SketchStep:
    """The rows of a step that choose: rows 0..num_rows-1 of the batch, num_tokens tokens; the rest reads everything."""

    num_rows: int
    num_tokens: int
    max_query_len: int


@dataclass(frozen=True)
class Shape:
    """The model's attention on this rank, and the largest batch."""

    layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    max_query_len: int
    """Tokens of the longest row that chooses."""
    max_num_reqs: int
    max_model_len: int


class Sketch:
    """Buffers that last, one set for all layers: they lie at the same addresses in every step, so that a captured graph
    follows what the host writes into them.

    dense [R] int32 says which rows read everything; page_table [R, H, width] and scores [R, H, width] serve one layer
    after the other; kept [layers, R, H] stays for the counts.
    """

    def __init__(
        self, operations: Operations, budget: Budget, bits: int, shape: Shape, counters: Counters, device: torch.device
    ) -> None:
        self.operations = operations
        self.budget = budget
        self.bits = bits
        self.shape = shape
        self.device = device
        self.num_kv_heads, self.head_size = shape.num_kv_heads, shape.head_size
        self.max_query_len = shape.max_query_len
        group = shape.num_heads // shape.num_kv_heads
        width = max(1 << (shape.max_query_len * group - 1).bit_length(), LEAST_ROWS)
        requests, heads = shape.max_num_reqs, shape.num_kv_heads
        new = {"device": device}
        self.packed = torch.empty((requests, heads, width, shape.head_size), dtype=torch.int8, **new)
        self.factors = torch.empty((requests, heads, 3, width), dtype=torch.float32, **new)
        self.histogram = torch.empty((requests, heads, BINS), dtype=torch.int32, **new)
        chunks = -(-shape.max_model_len // CHUNK)
        self.chunks = torch.empty((requests, heads, chunks, BINS), dtype=torch.int16, **new)
        self.cuts = torch.empty((requests, heads, 2), dtype=torch.int32, **new)
        self.starts = torch.empty((requests, heads, chunks, 2), dtype=torch.int32, **new)
        self.scores = torch.empty((requests, heads, shape.max_model_len), dtype=torch.uint8, **new)
        self.page_table = torch.empty((requests, heads, shape.max_model_len), dtype=torch.int32, **new)
        self.kept = torch.zeros((shape.layers, requests, heads), dtype=torch.int32, **new)
        self.dense = torch.ones(requests, dtype=torch.int32, **new)
        self.rotation = (
            torch.empty(0, **new) if device.type == "meta" else rotation(shape.head_size, shape.dtype, device)
        )
        self.layout = SketchLayout(heads, 16, shape.head_size, bits, shape.dtype.itemsize)
        self.counts = StepCounts(self, counters)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes by what they hold; the sketches themselves lie in the cache."""
        return {
            "queries": self.packed.nbytes + self.factors.nbytes,
            "scores": self.scores.nbytes + self.histogram.nbytes + self.chunks.nbytes,
            "page tables": self.page_table.nbytes + self.kept.nbytes + self.cuts.nbytes + self.starts.nbytes,
        }

    def short_rows(self, query_start_loc_cpu: torch.Tensor) -> int:
        """Rows before the first that is longer than any that chooses. vLLM puts rows with drafts first and sorts the
        rest by length, so these hold all that are past their prompt."""
        long = (query_start_loc_cpu[1:] - query_start_loc_cpu[:-1] > self.max_query_len).nonzero()
        return int(long[0, 0]) if long.numel() else query_start_loc_cpu.shape[0] - 1

    def begin(self, dense: np.ndarray, query_start_loc_cpu: torch.Tensor) -> SketchStep | None:
        """Announce a step; dense [R] bool on the host: rows that read everything. None where no row is short."""
        rows = self.short_rows(query_start_loc_cpu)
        if rows == 0:
            return None
        flags = torch.from_numpy(dense[:rows].astype(np.int32))
        if self.device.type == "cuda":
            flags = flags.pin_memory()
        self.dense[:rows].copy_(flags, non_blocking=True)
        lengths = query_start_loc_cpu[1 : rows + 1] - query_start_loc_cpu[:rows]
        return SketchStep(rows, int(query_start_loc_cpu[rows]), int(lengths.max()))
