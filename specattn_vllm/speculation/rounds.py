"""The common base of our speculators: rounds of drafting are counted, and replayed from CUDA graphs if possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.input_batch import InputBatch

from specattn_vllm import compat, executors
from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.reporter import Reporter
from specattn_vllm.speculation.counting import count_round
from specattn_vllm.speculation.graphs import RoundGraphs, RoundInputs
from specattn_vllm.stats import Counters

GRAPHS = {False: "plain_graphs", True: "recording_graphs"}
"""Whether a round is recorded -> the speculator's attribute with the graphs of such rounds. They must be attributes,
because vLLM looks for graph managers there when it discards the ones that it made to measure their memory."""


class RoundSpeculator(compat.stock_speculator()):
    """vLLM's standalone speculator, with CUDA graphs for its rounds. vLLM itself has none for this speculator.

    A subclass may have a `selection`. Then rounds of large batches are *recorded*: a selection is made from captured
    attention, or drafting reads through one. Other rounds run as in vLLM. Both kinds have graphs.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.options = SpecAttnOptions.from_vllm(vllm_config)
        self.operations = executors.of_engine(self.options, device, vllm_config)
        if self.operations.granularity == "block" and self.num_speculative_steps > 15:
            raise executors.ExecutorError(
                f"executor = 'xformers' verifies at most 15 draft tokens, not {self.num_speculative_steps}: lower "
                "--num-speculative-tokens, or set executor='triton'"
            )
        self.crossover_tokens = self.options.crossover(self.operations.name)
        self.counters = Counters(device)
        first = vllm_config.parallel_config.rank == 0
        self.reporter = Reporter(self.counters, self.options.stats_interval_s, logs=first)
        self.selection: Any = None
        self._recording = False
        """Whether a recorded round runs."""

    def _round(self, batch: InputBatch, *args, recording: bool, **kwargs) -> torch.Tensor:
        """Draft for a batch; arguments as in vLLM's `propose`. It runs directly or under CUDA graph capture. Under
        capture, all arguments are tensors of `RoundInputs`."""
        self._recording = recording
        try:
            return super().propose(batch, *args, **kwargs)
        finally:
            self._recording = False

    def _round_is_dense(self, batch: InputBatch) -> None:
        """Called before a round of a small batch. The target's next step must be dense."""

    def _round_records(self, batch: InputBatch) -> None:
        """Called before each recorded round."""

    def _kinds(self) -> list[bool]:
        """The kinds of rounds of this engine: recorded (True), not recorded (False), or both."""
        if self.selection is None:
            return [False]
        return [True, False] if self.crossover_tokens else [True]

    def _records(self, batch: InputBatch) -> bool:
        """Whether the round of a batch is recorded. The batch must not be one of vLLM's dummies."""
        if self.selection is None:
            return False
        # The host only knows upper bounds of lengths, which is good enough.
        small = int(batch.seq_lens_cpu_upper_bound[: batch.num_reqs].sum()) < self.crossover_tokens
        (self._round_is_dense if small else self._round_records)(batch)
        return not small

    def count_from_zero(self) -> None:
        """Rounds until now were vLLM's own."""
        self.counters.reset()
        self.reporter.reset()

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        super().init_cudagraph_manager(cudagraph_mode)
        full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        supported = self.attn_cg_support.min_cg_support.value >= AttentionCGSupport.UNIFORM_BATCH.value
        # Data parallelism and watermarking pass new tensors to each step, which a graph cannot read.
        if not (full and supported) or self.dp_size > 1 or self.draft_watermarker is not None:
            return
        query_len = self.num_speculative_steps + 1
        inputs = RoundInputs(self.max_num_reqs, query_len, self.device)
        for recording in self._kinds():
            setattr(self, GRAPHS[recording], RoundGraphs(self.vllm_config, self.device, query_len, inputs))

    @torch.inference_mode()
    def capture(self) -> None:
        super().capture()
        for recording in self._kinds():
            graphs = self._graphs(recording)
            if graphs is not None and graphs.needs_capture():
                what = "Capturing draft rounds" + (" with selection" if recording else "")
                graphs.capture_rounds(self._captured(graphs.inputs, recording), self.block_tables, what)

    def _graphs(self, recording: bool) -> RoundGraphs | None:
        """The graphs for recorded or other rounds; None if CUDA graphs are off."""
        return getattr(self, GRAPHS[recording], None)

    def _captured(self, given: RoundInputs, recording: bool) -> Callable[[InputBatch], Any]:
        """A function that runs a round on the inputs `given`, which have fixed addresses."""
        return lambda batch: self._round(
            batch,
            {},
            {},
            None,
            None,
            given.num_sampled[: batch.num_reqs],
            given.num_rejected[: batch.num_reqs],
            given.last_sampled,
            None,
            given.temperature,
            given.seeds,
            recording=recording,
        )

    def propose(
        self,
        input_batch,
        attn_metadata,
        slot_mappings,
        last_hidden_states,
        aux_hidden_states,
        num_sampled,
        num_rejected,
        last_sampled,
        next_prefill_tokens,
        temperature,
        seeds,
        *args,
        dummy_run: bool = False,
        **kwargs,
    ) -> torch.Tensor:
        # A dummy batch names slots of real requests, so it must not be stored or counted.
        recording = not dummy_run and self._records(input_batch)
        graphs = None if dummy_run else self._graphs(recording)
        desc = None if graphs is None else graphs.find(input_batch)
        if desc is not None:
            graphs.inputs.load(input_batch, desc.num_reqs, num_sampled, num_rejected, last_sampled, temperature, seeds)
            graphs.run_fullgraph(desc)
            drafts = self.draft_tokens[: input_batch.num_reqs]
        else:
            drafts = self._round(
                input_batch,
                attn_metadata,
                slot_mappings,
                last_hidden_states,
                aux_hidden_states,
                num_sampled,
                num_rejected,
                last_sampled,
                next_prefill_tokens,
                temperature,
                seeds,
                *args,
                dummy_run=dummy_run,
                recording=recording,
                **kwargs,
            )
        if dummy_run:
            self.counters.discard()
        else:
            self.counters.commit()
            count_round(self.counters, self.operations, input_batch, num_sampled)
            self.reporter.tick()
        return drafts
