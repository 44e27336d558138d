"""vLLM's standalone speculator that leaves a selection behind each time it drafts."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d

from specattn_vllm import compat, executors
from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.speculation.wiring import Selection, prepare
from specattn_vllm.stats import Counters, Reporter


class SpecAttnSpeculator(compat.stock_speculator()):
    """Drafts as vLLM does, and watches.

    Around upstream's `propose` (step 0 over the verified tokens, then K-1 single-token steps) it marks each draft
    step's metadata with the capture, and at the end stores the selection by request slot. What is drafted is upstream's
    affair, but for the attention of captured layers, which comes from the kernel that also leaves its scores.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.options = SpecAttnOptions.from_vllm(vllm_config)
        self.operations = executors.resolve(self.options.executor, device)
        self.counters = Counters(device)
        self.reporter = Reporter(self.counters, self.options.stats_interval_s)
        self.selection: Selection | None = None
        self._recording = False

    def load_model(self, target_model: torch.nn.Module) -> None:
        super().load_model(target_model)
        if not self.options.is_lossless:
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

    def capture(self) -> None:
        super().capture()
        # Capturing the target's graphs ran steps that nobody asked for.
        self.counters.reset()

    def propose(self, input_batch, attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_sampled,
                num_rejected, *args, dummy_run: bool = False, **kwargs) -> torch.Tensor:  # fmt: skip
        # A dummy batch names slots of real requests: nothing of it may be stored or counted.
        self._recording = self.selection is not None and not dummy_run
        num_reqs = input_batch.num_reqs
        if self._recording:
            # A row that sampled nothing is inside its prompt; it will not be verified next.
            self.selection.capture.begin_round(num_reqs, num_sampled[:num_reqs] > 0)
        try:
            drafts = super().propose(
                input_batch, attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_sampled,
                num_rejected, *args, dummy_run=dummy_run, **kwargs,
            )  # fmt: skip
        finally:
            recording, self._recording = self._recording, False
        if recording:
            bits, prefix_lens = self.selection.capture.select()
            self.selection.store.put(input_batch.idx_mapping[:num_reqs], bits, prefix_lens)
        if dummy_run:
            self.counters.discard()
        else:
            self._count(input_batch, num_sampled)
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
            capture.begin_step(capture.step + 1, None, self.input_buffers.seq_lens[:num_reqs])

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
            on_device = async_tensor_h2d(verified, device=self.device)
            self.counters.add(rounds=int(verified.sum()), sampled_tokens=(num_sampled[:num_reqs] * on_device).sum())
        if self.vllm_config.parallel_config.rank == 0:
            self.reporter.tick()
