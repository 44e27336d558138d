"""What all layers of a model share while they choose: options, buffers, and the step at hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from specattn_vllm.executors import Operations
from specattn_vllm.kernels.sketch.contracts import BINS, CHUNK, TOTALS, Budget
from specattn_vllm.kernels.sketch.layout import SketchLayout
from specattn_vllm.sketch.counting import StepCounts
from specattn_vllm.sketch.rotation import rotation
from specattn_vllm.stats import Counters

ROW_MULTIPLE = 128
LEAST_ROWS = 16  # the narrowest product of matrices


@dataclass(frozen=True)
class SketchStep:
    """The rows of a step that choose: rows 0..num_rows-1 of the batch, num_tokens tokens; the rest reads everything."""

    num_rows: int
    num_tokens: int
    max_query_len: int
    follows: bool = False
    """Whether the rows read what they chose in an earlier step, and what is newer."""


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

    dense [R] int32 says which rows read everything, heard [R] int32 how many of a row's queries count; page_table
    [T, R, H, width] serves one layer after the other where T is 1, and stays for steps that follow where there is one
    for each; scores [R, H, L] serve one layer after the other; kept [layers, R, H] stays for the counts. By request
    slot, the last of which is nobody's: totals and thresholds, of what layers share.
    """

    def __init__(
        self,
        operations: Operations,
        budget: Budget,
        bits: int,
        shape: Shape,
        counters: Counters,
        device: torch.device,
        steps_ahead: int | None = None,
    ) -> None:
        """With steps_ahead, so many steps may follow one that chooses, each a token longer; nothing is shared."""
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
        self.ahead = steps_ahead or 0
        tables, longest = (1, shape.max_model_len) if steps_ahead is None else (shape.layers, self._most())
        # Zeros: rows that chose nothing have nothing there that can be followed.
        self.page_table = torch.zeros((tables, requests, heads, longest), dtype=torch.int32, **new)
        self.kept = torch.zeros((shape.layers, requests, heads), dtype=torch.int32, **new)
        self.following = torch.zeros_like(self.kept)
        self.slots = torch.full((requests,), -1, dtype=torch.int32, **new)
        self.totals = torch.zeros((requests + 1, TOTALS), dtype=torch.int32, **new)
        self.thresholds = torch.full((requests + 1, 2), -1, dtype=torch.int32, **new)
        self.heard = torch.full((requests,), shape.max_query_len, dtype=torch.int32, **new)
        self.dense = torch.ones(requests, dtype=torch.int32, **new)
        self.rotation = (
            torch.empty(0, **new) if device.type == "meta" else rotation(shape.head_size, shape.dtype, device)
        )
        self.layout = SketchLayout(heads, 16, shape.head_size, bits, shape.dtype.itemsize)
        self.counts = StepCounts(counters, self.kept, self.dense, budget.reads_all_up_to)

    def _most(self) -> int:
        """The widest page table of a head, where heads share nothing."""
        shape, budget = self.shape, self.budget
        if budget.shared != "none" and budget.top_p is None:
            raise ValueError("page tables that stay are as wide as a head may read: heads cannot share what they read")
        most = max(math.ceil(budget.ratio * shape.max_model_len), budget.reads_all_up_to)
        most += shape.max_query_len + self.ahead
        return min(-(-most // ROW_MULTIPLE) * ROW_MULTIPLE, shape.max_model_len)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes by what they hold; the sketches themselves lie in the cache."""
        return {
            "queries": self.packed.nbytes + self.factors.nbytes,
            "scores": self.scores.nbytes + self.histogram.nbytes + self.chunks.nbytes,
            "page tables": sum(t.nbytes for t in (self.page_table, self.kept, self.following, self.cuts, self.starts)),
            "thresholds": self.totals.nbytes + self.thresholds.nbytes + self.slots.nbytes,
        }

    def short_rows(self, query_start_loc_cpu: torch.Tensor) -> int:
        """Rows before the first that is longer than any that chooses. vLLM puts rows with drafts first and sorts the
        rest by length, so these hold all that are past their prompt."""
        long = (query_start_loc_cpu[1:] - query_start_loc_cpu[:-1] > self.max_query_len).nonzero()
        return int(long[0, 0]) if long.numel() else query_start_loc_cpu.shape[0] - 1

    def forget(self, slot: int) -> None:
        """Another request enters a slot. Does not wait for the device."""
        self.totals[slot].zero_()

    def begin(self, dense: np.ndarray, slots: np.ndarray, query_start_loc_cpu: torch.Tensor) -> SketchStep | None:
        """Announce a step; on the host: dense [R] bool, rows that read everything, and slots [R] int32 of their
        requests, -1 for nobody's. None where no row is short."""
        rows = self.short_rows(query_start_loc_cpu)
        if rows == 0:
            return None
        for values, buffer in ((dense, self.dense), (slots, self.slots)):
            given = torch.from_numpy(values[:rows].astype(np.int32))
            if self.device.type == "cuda":
                given = given.pin_memory()
            buffer[:rows].copy_(given, non_blocking=True)
        return self.step(query_start_loc_cpu)

    def step(self, query_start_loc_cpu: torch.Tensor) -> SketchStep | None:
        """A step in which rows choose, as it lies; query_start_loc_cpu [R+1] on the host."""
        rows = self.short_rows(query_start_loc_cpu)
        if rows == 0:
            return None
        lengths = query_start_loc_cpu[1 : rows + 1] - query_start_loc_cpu[:rows]
        return SketchStep(rows, int(query_start_loc_cpu[rows]), int(lengths.max()))
