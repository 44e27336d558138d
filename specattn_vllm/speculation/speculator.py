"""vLLM's standalone speculator that leaves a selection behind each time it drafts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.input_batch import InputBatch

from specattn_vllm import compat, executors
from specattn_vllm.crossover import crossover_tokens
from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.request import asks_for_exactness
from specattn_vllm.speculation.graphs import RoundGraphs, RoundInputs
from specattn_vllm.speculation.wiring import Selection, prepare
from specattn_vllm.stats import Counters, Reporter


class SpecAttnSpeculator(compat.stock_speculator()):
    """Drafts as vLLM does, and watches.

    Around upstream's `propose` (step 0 over the verified tokens, then K-1 single-token steps) it marks each draft
    step's metadata with the capture, and at the end stores the selection by request slot. What is drafted is upstream's
    affair, but for the attention of captured layers, which comes from the kernel that also leaves its scores. Rounds of
    uniform batches are replayed from CUDA graphs, which upstream has none of for this speculator.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.options = SpecAttnOptions.from_vllm(vllm_config)
        self.operations = executors.resolve(self.options.executor, device, vllm_config.model_config.dtype)
        if self.operations.granularity == "block" and self.num_speculative_steps > 15:
            raise executors.ExecutorError(
                f"executor = 'xformers' verifies at most 15 draft tokens, not {self.num_speculative_steps}: lower "
                "--num-speculative-tokens, or set executor='triton'"
            )
        self.crossover_tokens = crossover_tokens(self.options, self.operations)
        self.counters = Counters(device)
        self.reporter = Reporter(self.counters, self.options.stats_interval_s)
        self.selection: Selection | None = None
        self._recording = False
        # Direct attributes: vLLM finds graph managers here when it discards those it made to measure their memory.
        self.recording_graphs: RoundGraphs | None = None
        self.plain_graphs: RoundGraphs | None = None

    def load_model(self, target_model: torch.nn.Module) -> None:
        super().load_model(target_model)
        if not self.options.is_lossless or self.options.sparse_draft:
            self.selection = prepare(self)

    def set_attn(self, model_state, kv_cache_config, block_tables, target_input_buffers, target_attn_groups) -> None:
        super().set_attn(model_state, kv_cache_config, block_tables, target_input_buffers, target_attn_groups)
        if len(kv_cache_config.kv_cache_groups) != 1:
            raise ValueError(
                f"specattn needs draft and target in one KV-cache group, but vLLM made "
                f"{len(kv_cache_config.kv_cache_groups)}: models with mixed attention types are not supported"
            )
        if self.selection is not None:
            self.selection.attach(target_attn_groups)
            store = self.selection.store
            compat.watch_new_requests(model_state, lambda slot, params: store.hold(slot, asks_for_exactness(params)))

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        super().init_cudagraph_manager(cudagraph_mode)
        full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        supported = self.attn_cg_support.min_cg_support.value >= AttentionCGSupport.UNIFORM_BATCH.value
        # Watermarks and ranks in lockstep bring tensors of their own to each step.
        if not (full and supported) or self.dp_size > 1 or self.draft_watermarker is not None:
            return
        query_len = self.num_speculative_steps + 1
        inputs = RoundInputs(self.max_num_reqs, query_len, self.device)
        if self.selection is not None:
            self.recording_graphs = RoundGraphs(self.vllm_config, self.device, query_len, inputs)
        if self.selection is None or self.crossover_tokens:
            self.plain_graphs = RoundGraphs(self.vllm_config, self.device, query_len, inputs)

    @torch.inference_mode()
    def capture(self) -> None:
        super().capture()
        for graphs, recording in ((self.recording_graphs, True), (self.plain_graphs, False)):
            if graphs is not None and graphs.needs_capture():
                what = "Capturing draft rounds" + (" with selection" if recording else "")
                graphs.capture_rounds(self._captured(graphs.inputs, recording), self.block_tables, what)
        # Capturing the target's graphs ran steps that nobody asked for.
        self.counters.reset()

    def _captured(self, given: RoundInputs, recording: bool) -> Callable[[InputBatch], Any]:
        """A round on inputs that last."""
        return lambda batch: self._round(
            batch, {}, {}, None, None, given.num_sampled[: batch.num_reqs], given.num_rejected[: batch.num_reqs],
            given.last_sampled, None, given.temperature, given.seeds, recording=recording,
        )  # fmt: skip

    def propose(self, input_batch, attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_sampled,
                num_rejected, last_sampled, next_prefill_tokens, temperature, seeds, *args, dummy_run: bool = False,
                **kwargs) -> torch.Tensor:  # fmt: skip
        # A dummy batch names slots of real requests: nothing of it may be stored or counted.
        recording = self.selection is not None and not dummy_run
        if recording and self._too_small(input_batch):
            recording = False
            self.selection.store.clear(input_batch.idx_mapping)
        graphs = self.recording_graphs if recording else self.plain_graphs
        desc = graphs.find(input_batch) if graphs is not None and not dummy_run else None
        if desc is not None:
            graphs.inputs.load(input_batch, desc.num_reqs, num_sampled, num_rejected, last_sampled, temperature, seeds)
            graphs.run_fullgraph(desc)
            drafts = self.draft_tokens[: input_batch.num_reqs]
        else:
            drafts = self._round(
                input_batch, attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_sampled,
                num_rejected, last_sampled, next_prefill_tokens, temperature, seeds, *args, dummy_run=dummy_run,
                recording=recording, **kwargs,
            )  # fmt: skip
        if dummy_run:
            self.counters.discard()
        else:
            self._count(input_batch, num_sampled)
        return drafts

    def _too_small(self, batch: InputBatch) -> bool:
        """Whether a batch is below the crossover; lengths on the host are bounds, which is near enough."""
        return int(batch.seq_lens_cpu_upper_bound[: batch.num_reqs].sum()) < self.crossover_tokens

    def _round(self, batch, attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_sampled, *args,
               recording: bool, **kwargs) -> torch.Tensor:  # fmt: skip
        """Upstream's `propose`, with its attention captured and a selection stored if `recording`. It runs as it is or
        under CUDA graph capture: then every argument lies in `RoundInputs`."""
        self._recording = recording
        num_reqs = batch.num_reqs
        if recording:
            # A row that sampled nothing is inside its prompt, or fills a graph's batch: it will not be verified next.
            # Nor is anything to be selected for requests that asked for exactness.
            wanted = (num_sampled[:num_reqs] > 0) & ~self.selection.store.exact[batch.idx_mapping[:num_reqs]]
            self.selection.capture.begin_round(num_reqs, wanted)
        try:
            drafts = super().propose(
                batch, attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_sampled, *args, **kwargs
            )
        finally:
            self._recording = False
        if recording and self.selection.pruner is not None:
            bits, prefix_lens = self.selection.capture.select()
            self.selection.store.put(batch.idx_mapping[:num_reqs], bits, prefix_lens)
        return drafts

    def _build_attn_metadata(self, num_reqs: int, *args, step: int, **kwargs) -> dict[str, Any] | None:
        metadata = super()._build_attn_metadata(num_reqs, *args, step=step, **kwargs)
        if self._recording and metadata is not None:
            self._begin_step(num_reqs, first=step == 0)
            for layer_metadata in metadata.values():
                layer_metadata.capture = self.selection.capture
        return metadata

    def _begin_step(self, num_reqs: int, *, first: bool) -> None:
        capture = self.selection.capture
        if first:
            # Rejected tokens follow the sampled row inside each request's stretch, so the row is not the last one.
            rows = self.last_token_indices[:num_reqs]
            capture.begin_step(0, rows, self.expanded_positions[rows] + 1)
        else:
            capture.begin_step(capture.step + 1, None, None)

    def _run_model(self, *args, **kwargs) -> torch.Tensor:
        hidden_states = super()._run_model(*args, **kwargs)
        if self._recording:
            self.selection.capture.end_step()
        return hidden_states

    def _count(self, input_batch, num_sampled: torch.Tensor) -> None:
        self.counters.commit()
        drafts, num_reqs = input_batch.num_draft_tokens_per_req, input_batch.num_reqs
        if drafts is not None:
            # vLLM pads a request with one prompt token left to the length of a verification: those drafts are none.
            verified = (drafts[:num_reqs] > 0) & ~input_batch.is_prefilling_np[:num_reqs]
            rounds = int(verified.sum())
            self.counters.add(rounds=rounds)
            if rounds:
                # Most batches only verify: which rows do need not be sent.
                mask = None if rounds == num_reqs else async_tensor_h2d(verified, device=self.device)
                self.operations.count_sampled(num_sampled[:num_reqs], mask, self.counters.on_device("sampled_tokens"))
        if self.vllm_config.parallel_config.rank == 0:
            self.reporter.tick()
