"""What all layers of a model share while they choose: options, buffers, and the step at hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from specattn_vllm.executors import Operations
from specattn_vllm.kernels.sketch.contracts import BINS, CHUNK, TOTALS, Budget
from specattn_vllm.kernels.sketch.layout import SketchLayout
from specattn_vllm.selection.own_choice import Chooser
from specattn_vllm.sketch.rotation import rotation
from specattn_vllm.stats import Counters

ROW_MULTIPLE = 128
LEAST_ROWS = 16  # the narrowest product of matrices


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


class Sketch(Chooser):
    """Buffers that last, one set for all layers: they lie at the same addresses in every step, so that a captured graph
    follows what the host writes into them.

    heard [R] int32 says how many of a row's queries count; page_table [T, R, H, width] serves one layer after the other
    where T is 1, and stays for steps that follow where there is one for each; scores [R, H, L] serve one layer after
    the other. By request slot, the last of which is nobody's: totals and thresholds, of what layers share.
    """

    searches = True

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
        super().__init__(
            counters,
            layers=shape.layers,
            num_kv_heads=shape.num_kv_heads,
            max_query_len=shape.max_query_len,
            max_num_reqs=shape.max_num_reqs,
            reads_all_up_to=budget.reads_all_up_to,
            device=device,
        )
        self.operations = operations
        self.budget = budget
        self.bits = bits
        self.shape = shape
        self.head_size = shape.head_size
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
        self.following = torch.zeros_like(self.kept)
        self.totals = torch.zeros((requests + 1, TOTALS), dtype=torch.int32, **new)
        self.thresholds = torch.full((requests + 1, 2), -1, dtype=torch.int32, **new)
        self.heard = torch.full((requests,), shape.max_query_len, dtype=torch.int32, **new)
        self.rotation = (
            torch.empty(0, **new) if device.type == "meta" else rotation(shape.head_size, shape.dtype, device)
        )
        self.layout = SketchLayout(heads, 16, shape.head_size, bits, shape.dtype.itemsize)

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

    def forget(self, slot: int) -> None:
        """Another request enters a slot. Does not wait for the device."""
        self.totals[slot].zero_()
