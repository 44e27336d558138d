"""The contract of methods whose target chooses for itself, in each step and layer (`Method.target_reads`).

A step is announced before it runs: on the host it is known which rows may choose (short ones, past their prompt). Each
layer then turns its queries into a page table, which attention reads. Nothing may wait for the device, and what is
read or written in a step lies in buffers that last, so that the step can be captured in a CUDA graph.

    Chooser      what all layers share: buffers, and what is known of the step at hand
    LayerChoice  one layer: what it keeps beside the cache, and its choice
    ChoiceStep   the rows of one step that choose
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from specattn_vllm.selection.counting import StepCounts
from specattn_vllm.stats import Counters


@dataclass(frozen=True)
class ChoiceStep:
    """The rows of a step that choose: rows 0..num_rows-1 of the batch, num_tokens tokens; the rest reads everything."""

    num_rows: int
    num_tokens: int
    max_query_len: int
    follows: bool = False
    """Whether the rows read what they chose in an earlier step, and what is newer."""


class Chooser:
    """What the layers of a target share. A subclass adds buffers, and what else a new request or a step changes.

    kept   [layers, R, H] int32: entries that each KV head read in the last step; layers write it, counting reads it
    dense  [R] int32: rows of the step at hand that read everything
    slots  [R] int32: vLLM's slots of their requests, -1 for rows that are nobody's
    """

    searches = False
    """Whether a sketch of the context is read before anything is chosen (`kernels/sketch/`), which is counted apart."""

    def __init__(
        self,
        counters: Counters,
        *,
        layers: int,
        num_kv_heads: int,
        max_query_len: int,
        max_num_reqs: int,
        reads_all_up_to: int,
        device: torch.device,
    ) -> None:
        """max_query_len: tokens of the longest row that chooses; contexts of up to reads_all_up_to tokens are read
        whole, without a search."""
        new = {"dtype": torch.int32, "device": device}
        self.device = device
        self.num_kv_heads = num_kv_heads
        self.max_query_len = max_query_len
        self.reads_all_up_to = reads_all_up_to
        self.kept = torch.zeros((layers, max_num_reqs, num_kv_heads), **new)
        self.dense = torch.ones(max_num_reqs, **new)
        self.slots = torch.full((max_num_reqs,), -1, **new)
        self.counts = StepCounts(counters, self.kept, self.dense, reads_all_up_to, self.searches)

    def forget(self, slot: int) -> None:
        """Another request enters a slot. Does not wait for the device."""

    def choose_among(self, seq_lens: torch.Tensor, query_start_loc: torch.Tensor) -> torch.Tensor:
        """Which rows of the step at hand choose [R] bool, from their seq_lens [R] and query_start_loc [R+1] int32."""
        context = seq_lens - (query_start_loc[1:] - query_start_loc[:-1])
        return (self.dense[: seq_lens.shape[0]] == 0) & (context > self.reads_all_up_to)

    def short_rows(self, query_start_loc_cpu: torch.Tensor) -> int:
        """Rows before the first that is longer than any that chooses. vLLM puts rows with drafts first and sorts the
        rest by length, so these hold all that are past their prompt."""
        long = (query_start_loc_cpu[1:] - query_start_loc_cpu[:-1] > self.max_query_len).nonzero()
        return int(long[0, 0]) if long.numel() else query_start_loc_cpu.shape[0] - 1

    def begin(self, dense: np.ndarray, slots: np.ndarray, query_start_loc_cpu: torch.Tensor) -> ChoiceStep | None:
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

    def step(self, query_start_loc_cpu: torch.Tensor) -> ChoiceStep | None:
        """A step in which rows choose, as it lies; query_start_loc_cpu [R+1] on the host."""
        rows = self.short_rows(query_start_loc_cpu)
        if rows == 0:
            return None
        lengths = query_start_loc_cpu[1 : rows + 1] - query_start_loc_cpu[:rows]
        return ChoiceStep(rows, int(query_start_loc_cpu[rows]), int(lengths.max()))


class LayerChoice:
    """What the implementation of a target's layer holds."""

    probing = False
    """Whether a forward pass without a cache is a measurement of this object's (`probe`)."""

    def probe(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, output: torch.Tensor
    ) -> None:
        """Attend without a cache, and measure. query, output [T, Hq, D] or flat; key, value [T, H, D] or flat."""
        raise NotImplementedError

    def write(self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> bool:
        """Keep what choosing needs of new keys. key, value [T, H, D]; kv_cache [B, H, N, 2D]; slot_mapping [S] int64.
        Returns whether keys and values are in the cache now; if not, they are written by the caller."""
        return False

    def forget_cache(self) -> None:
        """vLLM is about to allocate the cache anew: no view of the one before may be left."""

    def select(
        self,
        step: ChoiceStep,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the step's rows read of this layer, for each KV head: page table [R, H, width] int32, and kept [R, H]
        int32, which is written into `Chooser.kept` too. A page is one token's entry of one head: block, head and offset
        times `selection.pages.page_strides(kv_cache)`. The tokens of the step itself come last, in order.

        query [T, Hq, D] of those rows; block_table [R, blocks], seq_lens [R] and query_start_loc [R+1] int32.
        """
        raise NotImplementedError
