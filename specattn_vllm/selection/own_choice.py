"""The contract of methods whose target chooses for itself, in each step and layer (`Method.target_reads`).

A step is announced before it runs, because the host knows which rows may choose: short rows past their prompt. Each
layer then turns its queries into a page table, and attention reads through it. The host must never wait for the device,
and a step may only use buffers that keep their addresses, so that it can be captured in a CUDA graph.

    Chooser      shared by all layers: buffers, and the state of the current step
    LayerChoice  for one layer: the data that it keeps beside the cache, and its selection
    ChoiceStep   the rows of one step that choose
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from specattn_vllm.executors import Operations
from specattn_vllm.selection.clock import Clock
from specattn_vllm.selection.counting import StepCounts
from specattn_vllm.selection.plan import short_rows
from specattn_vllm.stats import Counters


@dataclass(frozen=True)
class ChoiceStep:
    """The rows of a step that may choose: rows 0..num_rows-1 of the batch, with num_tokens tokens. All later rows are
    dense."""

    num_rows: int
    num_tokens: int
    max_query_len: int
    follows: bool = False
    """Whether the rows read their selection of an earlier step and all newer tokens, instead of choosing again."""


class Chooser:
    """The state that the layers of a target share. A subclass adds buffers and may extend `forget` and `step`.

    kept   [layers, R, H] int32: entries that each KV head read in the last step; layers write it, counting reads it
    dense  [R] int32: 1 for dense rows of the current step
    slots  [R] int32: vLLM's request slot of each row, -1 for padded rows
    """

    searches = False
    """Whether choosing reads a sketch of the context (`kernels/sketch/`). These reads are counted separately."""

    def __init__(
        self,
        counters: Counters,
        *,
        layers: int,
        num_kv_heads: int,
        max_query_len: int,
        max_num_reqs: int,
        dense_up_to: int,
        device: torch.device,
    ) -> None:
        """max_query_len: most tokens of a row that chooses. dense_up_to: contexts of up to this many tokens are
        dense, without a search."""
        new = {"dtype": torch.int32, "device": device}
        self.device = device
        self.num_kv_heads = num_kv_heads
        self.max_query_len = max_query_len
        self.dense_up_to = dense_up_to
        self.kept = torch.zeros((layers, max_num_reqs, num_kv_heads), **new)
        self.dense = torch.ones(max_num_reqs, **new)
        self.slots = torch.full((max_num_reqs,), -1, **new)
        self.counts = StepCounts(counters, self.kept, self.dense, dense_up_to, self.searches)

    def forget(self, slot: int) -> None:
        """A new request enters a slot. Does not wait for the device."""

    def choose_among(self, seq_lens: torch.Tensor, query_start_loc: torch.Tensor) -> torch.Tensor:
        """The rows of the current step that choose, [R] bool. seq_lens [R] and query_start_loc [R+1] int32."""
        context = seq_lens - (query_start_loc[1:] - query_start_loc[:-1])
        return (self.dense[: seq_lens.shape[0]] == 0) & (context > self.dense_up_to)

    def short_rows(self, query_start_loc_cpu: torch.Tensor) -> tuple[int, int, int]:
        """`plan.short_rows` for rows that may choose."""
        return short_rows(query_start_loc_cpu, self.max_query_len)

    def begin(self, dense: np.ndarray, slots: np.ndarray, query_start_loc_cpu: torch.Tensor) -> ChoiceStep | None:
        """Announce a step. On the host: dense [R] bool, rows that do not choose; slots [R] int32, their request slots,
        -1 for padded rows. Returns None if no row is short."""
        rows, *_ = self.short_rows(query_start_loc_cpu)
        if rows == 0:
            return None
        for values, buffer in ((dense, self.dense), (slots, self.slots)):
            given = torch.from_numpy(values[:rows].astype(np.int32))
            if self.device.type == "cuda":
                given = given.pin_memory()
            buffer[:rows].copy_(given, non_blocking=True)
        return self.step(query_start_loc_cpu)

    def step(self, query_start_loc_cpu: torch.Tensor) -> ChoiceStep | None:
        """The step in which the short rows choose; None if no row is short. query_start_loc_cpu [R+1] on the host."""
        rows, tokens, longest = self.short_rows(query_start_loc_cpu)
        return ChoiceStep(rows, tokens, longest) if rows else None


class ChoiceBatch(NamedTuple):
    """The rows of a `ChoiceStep` in one layer."""

    query: torch.Tensor
    """[T, Hq, D]"""
    kv_cache: torch.Tensor
    """[B, H, N, 2D]"""
    block_table: torch.Tensor
    """[R, blocks] int32"""
    seq_lens: torch.Tensor
    """[R] int32, the step's own tokens included."""
    query_start_loc: torch.Tensor
    """[R+1] int32"""
    scale: float
    """Multiplies the products of queries and keys."""


class NewEntries(NamedTuple):
    """Keys and values of a step's tokens, and where they go in one layer."""

    key: torch.Tensor
    """[T, H, D]"""
    value: torch.Tensor
    """[T, H, D]"""
    kv_cache: torch.Tensor
    """[B, H, N, 2D]"""
    slot_mapping: torch.Tensor
    """[S] int64, S <= T"""
    key_scale: float = 1.0
    """What 1 in an fp8 cache is worth: keys are divided by it, and rounded. `ChoiceBatch.scale` is for keys as they are
    in the cache."""
    value_scale: float = 1.0


class LayerChoice:
    """The state of a method in one layer; the layer's attention implementation holds it."""

    probing = False
    """Whether forward passes without a cache are measurements for this object (`probe`)."""
    confirms = False
    """Whether `confirm` is called after attention over the selection."""
    clock: AbstractContextManager[None] = nullcontext()
    """Measures `select`; in one layer of a model, for all its layers (`measure`)."""

    def probe(self, impl: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor) -> None:
        """Attend without a cache, and measure. impl: the layer's implementation, with its `scale`, `sinks` and
        `key_scale`; query, out [T, Hq, D] or flat; key, value [T, H, D] or flat."""
        raise NotImplementedError

    def write(self, new: NewEntries) -> bool:
        """Store the data about new keys that choosing needs. Returns whether this call also wrote keys and values to
        the cache; if not, the caller does."""
        return False

    def note_filled(self, key: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Keys [T, H, D], as they are in the cache, came into its slots [T] int64 without `write`."""

    def forget_cache(self) -> None:
        """Drop all views of the cache: vLLM is about to allocate a new one."""

    def select(self, step: ChoiceStep, batch: ChoiceBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The entries of this layer that the step's rows read, for each KV head: page table [R, H, width] int32, and
        kept [R, H] int32, which this also writes into `Chooser.kept`. A page is the entry of one token and one head;
        its id is the sum of block, head and offset, each times its `selection.pages.page_strides(kv_cache)`. The tokens
        of the step itself are last, in order."""
        raise NotImplementedError

    def confirm(self, step: ChoiceStep, batch: ChoiceBatch, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Look at the attention over the selection, and replace it where it does not suffice. out [T, Hq, D], lse [T,
        Hq] float32: its result and logsumexp, which may be overwritten."""
        raise NotImplementedError


def measure(layers: Sequence[LayerChoice], operations: Operations, total: torch.Tensor) -> None:
    """Add the nanoseconds of all layers' `select` to a total, [1] int64. One layer in the middle stands for
    all: each measurement takes two launches, and only a step's first layer does a little more."""
    layers[len(layers) // 2].clock = Clock(operations, total, times=len(layers))
