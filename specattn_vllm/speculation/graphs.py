"""A whole round of drafting as one CUDA graph.

vLLM's standalone speculator launches every kernel of its K draft steps from Python. Here its `propose` is captured once
per batch size, on buffers of our own, and replayed later: a round is then a few copies and one graph launch. A graph
contains the draft model's forward passes, sampling, slot mappings and the selection.

Only uniform batches have a graph: every request has just been verified with its K draft tokens. Other batches, and
batches beyond vLLM's largest capture size, run as in vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

from specattn_vllm import executors
from specattn_vllm.kernels.bookkeeping.contracts import Round


class RoundInputs:
    """The inputs of a round, at fixed addresses. Rows after the batch's requests have slot -1 and no context."""

    def __init__(self, max_num_reqs: int, query_len: int, device: torch.device) -> None:
        self.query_len = query_len
        self.buffers = InputBuffers(max_num_reqs, max_num_reqs * query_len, device)
        self.query_start_loc = torch.arange(max_num_reqs + 1, dtype=torch.int32, device=device) * query_len
        self.idx_mapping = torch.full((max_num_reqs,), -1, dtype=torch.int64, device=device)
        self.num_sampled = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        self.num_rejected = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        # One more element before the first: vLLM's kernel reads the last token of slot -1 before it masks the row.
        # The dtype is int32, so that vLLM uses this tensor and not a copy.
        self._last_sampled = torch.zeros(max_num_reqs + 1, dtype=torch.int32, device=device)
        self.last_sampled = self._last_sampled[1:]
        self.temperature = torch.zeros(max_num_reqs, dtype=torch.float32, device=device)
        self.seeds = torch.zeros(max_num_reqs, dtype=torch.int64, device=device)
        buffers = self.buffers
        self._held = Round(
            buffers.input_ids,
            buffers.positions,
            buffers.seq_lens,
            self.idx_mapping,
            self.num_sampled,
            self.num_rejected,
            self.last_sampled,
            self.temperature,
            self.seeds,
        )
        # All executors share this operation; they differ only in attention.
        self._load_round = executors.resolve("triton" if device.type == "cuda" else "torch", device).load_round

    def batch(self, rows: int) -> InputBatch:
        """A batch of `rows` verifications for vLLM's `propose`. Its host tensors hold no real contents."""
        dummy = InputBatch.make_dummy(rows, rows * self.query_len, self.buffers, max_query_len=self.query_len)
        return replace(
            dummy,
            idx_mapping=self.idx_mapping[:rows],
            query_start_loc=self.query_start_loc[: rows + 1],
            query_start_loc_np=np.arange(rows + 1, dtype=np.int32) * self.query_len,
        )

    def clear(self) -> None:
        """Remove the requests from all rows."""
        self.idx_mapping.fill_(-1)
        for tensor in (self.num_sampled, self.num_rejected, self.buffers.seq_lens, self.buffers.positions):
            tensor.zero_()

    def load(self, batch: InputBatch, rows: int, num_sampled, num_rejected, last_sampled, temperature, seeds) -> None:
        """Copy the inputs of a step, for a graph of `rows` rows, in stream order."""
        given = Round(
            batch.input_ids,
            batch.positions,
            batch.seq_lens,
            batch.idx_mapping,
            num_sampled,
            num_rejected,
            last_sampled.view(-1),
            temperature,
            seeds,
        )
        self._load_round(given, self._held, batch.num_reqs, rows, self.query_len)


def thinned(sizes: list[int], query_len: int) -> list[int]:
    """The subset of vLLM's capture sizes, in tokens, for which a round gets a graph.

    vLLM has about one size for every eight tokens. Capturing a round takes as long as running it a few times, and a
    padded row costs almost nothing, because it has no context to read. So a size gets a graph if it has at least a
    third more rows than the size before; the largest usable size always gets one. Sizes that exceed the largest when
    rounded up to whole rows are not usable, because vLLM drops them.
    """
    rows_of = {size: -(-size // query_len) for size in sorted(sizes)}
    usable = [size for size, rows in rows_of.items() if rows * query_len <= max(sizes)]
    kept: list[int] = []
    for size in usable:
        before = rows_of[kept[-1]] if kept else 0
        if rows_of[size] > before and (rows_of[size] <= 4 or 3 * rows_of[size] >= 4 * before):
            kept.append(size)
    return sorted({*kept, *usable[-1:]})


class RoundGraphs(CudaGraphManager):
    """CUDA graphs of a round, one per number of rows. vLLM's base class does sizes, dispatch, memory and profiling."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, query_len: int, inputs: RoundInputs) -> None:
        super().__init__(vllm_config, device, CUDAGraphMode.FULL_DECODE_ONLY, decode_query_len=query_len)
        self.inputs = inputs

    def _init_candidates(self) -> None:
        config = self.compilation_config
        sizes = config.cudagraph_capture_sizes
        config.cudagraph_capture_sizes = thinned(sizes or [], self.decode_query_len)
        try:
            super()._init_candidates()
        finally:
            config.cudagraph_capture_sizes = sizes

    def capture_rounds(self, run: Callable[[InputBatch], None], block_tables: BlockTables, description: str) -> None:
        """Capture run(batch) for every size. A replay repeats only the work of `run`."""

        def create(desc: BatchExecutionDescriptor, warmup: bool) -> Callable[[CUDAGraphMode], None]:
            del warmup
            batch = self.inputs.batch(desc.num_reqs)
            self.inputs.clear()
            block_tables.get_dummy_block_tables(desc.num_reqs)
            return lambda mode: run(batch)

        self.capture(create, description)

    def find(self, batch: InputBatch) -> BatchExecutionDescriptor | None:
        """The graph for a batch; None if there is none."""
        query_len = self.inputs.query_len
        if batch.num_tokens != batch.num_reqs * query_len or int(batch.num_scheduled_tokens.max()) != query_len:
            return None
        desc = self.dispatch(batch.num_reqs, batch.num_tokens, query_len, 0)
        return desc if desc.cg_mode == CUDAGraphMode.FULL else None
