"""vLLM's standalone speculator that leaves a selection behind each time it drafts."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.input_batch import InputBatch

from specattn_vllm import compat
from specattn_vllm.request import asks_for_exactness
from specattn_vllm.speculation.rounds import RoundSpeculator
from specattn_vllm.speculation.wiring import Selection, prepare


class SpecAttnSpeculator(RoundSpeculator):
    """Drafts with a draft model as vLLM does, and watches.

    Around upstream's `propose` (step 0 over the verified tokens, then K-1 single-token steps) it marks each draft
    step's metadata with the capture, and at the end stores the selection by request slot. What is drafted is upstream's
    affair, but for the attention of captured layers, which comes from the kernel that also leaves its scores.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.selection: Selection | None = None
        self._recording = False

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

    def _step_aside(self, batch: InputBatch) -> None:
        self.selection.store.clear(batch.idx_mapping)

    def _round(self, batch, attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_sampled, *args,
               recording: bool, **kwargs) -> torch.Tensor:  # fmt: skip
        """Upstream's `propose`, with its attention captured and a selection stored if `recording`."""
        self._recording = recording
        num_reqs = batch.num_reqs
        if recording:
            # A row that sampled nothing is inside its prompt, or fills a graph's batch: it will not be verified next.
            # Nor is anything to be selected for requests that asked for exactness.
            wanted = (num_sampled[:num_reqs] > 0) & ~self.selection.store.exact[batch.idx_mapping[:num_reqs]]
            self.selection.capture.begin_round(num_reqs, wanted)
        try:
            drafts = self._upstream_round(
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
