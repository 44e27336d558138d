"""What all layers of a model share while they choose: options, buffers and the state of the current step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from specattn_vllm.executors import Operations
from specattn_vllm.kernels.sketch.contracts import BINS, CHUNK, TOTALS, Budget
from specattn_vllm.kernels.sketch.layout import SketchLayout
from specattn_vllm.selection.own_choice import Chooser
from specattn_vllm.sketch.guarantee import Guarantee, Promise
from specattn_vllm.sketch.rotation import rotation
from specattn_vllm.stats import Counters

ROW_MULTIPLE = 128
LEAST_ROWS = 16  # the narrowest matrix product of the kernels


@dataclass(frozen=True)
class Shape:
    """Sizes of the model's attention on this rank, and of the largest batch."""

    layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    element_size: int
    """Bytes of an element of the KV cache."""
    max_query_len: int
    """Most tokens of a row that chooses."""
    max_num_reqs: int
    max_model_len: int


class Sketch(Chooser):
    """Permanent buffers, one set for all layers. Their addresses are the same in every step, so a captured CUDA graph
    reads what the host has written into them.

    valid_lens [R] int32: how many queries of each row count in the search. page_table [T, R, H, width]: with T = 1 the
    layers use it one after the other; with one table per layer it stays for the steps that follow. scores [R, H, L]:
    the layers use them one after the other. totals and thresholds, by request slot: the budget that layers share; the
    last slot belongs to no request.
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
        promise: Promise | None = None,
    ) -> None:
        """steps_ahead: how many steps, each one token longer, may follow a step that chooses. With it, heads must not
        share a budget. promise: what is checked after each selection, not with steps_ahead."""
        super().__init__(
            counters,
            layers=shape.layers,
            num_kv_heads=shape.num_kv_heads,
            max_query_len=shape.max_query_len,
            max_num_reqs=shape.max_num_reqs,
            dense_up_to=budget.dense_up_to,
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
        # Zeros: a later step must find no pages for rows that have not chosen.
        self.page_table = torch.zeros((tables, requests, heads, longest), dtype=torch.int32, **new)
        self.following = torch.zeros_like(self.kept)
        self.totals = torch.zeros((requests + 1, TOTALS), dtype=torch.int32, **new)
        self.thresholds = torch.full((requests + 1, 2), -1, dtype=torch.int32, **new)
        self.valid_lens = torch.full((requests,), shape.max_query_len, dtype=torch.int32, **new)
        self.rotation = (
            torch.empty(0, **new) if device.type == "meta" else rotation(shape.head_size, shape.dtype, device)
        )
        self.guarantee: Guarantee | None = None
        if promise is not None:
            self.guarantee = Guarantee(promise, shape.layers, requests, heads, device)
            self.counts.guard(self.guarantee.fallen, promise.draws)
        self.layout = SketchLayout(heads, 16, shape.head_size, bits, shape.element_size)

    def _most(self) -> int:
        """Width of the largest page table of a head, for heads that share no budget."""
        shape, budget = self.shape, self.budget
        if budget.shared != "none" and budget.top_p is None:
            raise ValueError("with steps_ahead, page tables are as wide as one head's budget: heads cannot share it")
        most = max(math.ceil(budget.ratio * shape.max_model_len), budget.dense_up_to)
        most += shape.max_query_len + self.ahead
        return min(-(-most // ROW_MULTIPLE) * ROW_MULTIPLE, shape.max_model_len)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of each kind of buffer. The sketches themselves lie in the KV cache and are not counted."""
        return {
            "queries": self.packed.nbytes + self.factors.nbytes,
            "scores": self.scores.nbytes + self.histogram.nbytes + self.chunks.nbytes,
            "page tables": sum(t.nbytes for t in (self.page_table, self.kept, self.following, self.cuts, self.starts)),
            "guarantee": 0 if self.guarantee is None else self.guarantee.nbytes,
            "thresholds": self.totals.nbytes + self.thresholds.nbytes + self.slots.nbytes,
        }

    def forget(self, slot: int) -> None:
        """A new request enters a slot. Does not wait for the device."""
        self.totals[slot].zero_()
