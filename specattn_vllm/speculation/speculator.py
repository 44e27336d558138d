"""vLLM's standalone speculator, which also stores a selection after each round of drafting."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.worker.gpu.input_batch import InputBatch

from specattn_vllm import compat
from specattn_vllm.backend.audits import prepare_audit
from specattn_vllm.request import asks_for_exactness
from specattn_vllm.selection.audit import Audit
from specattn_vllm.speculation.rounds import RoundSpeculator
from specattn_vllm.speculation.wiring import prepare


class SpecAttnSpeculator(RoundSpeculator):
    """Drafts with a draft model as vLLM does, and captures its attention.

    During vLLM's `propose` (step 0 over the verified tokens, then K-1 single-token steps) it adds the capture to the
    metadata of each draft step. At the end it stores the selection by request slot. All drafting is vLLM's own, except
    for the attention of captured layers: a kernel of ours attends there and also stores the scores.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.audit: Audit | None = None

    def load_model(self, target_model: torch.nn.Module) -> None:
        super().load_model(target_model)
        self.selection = prepare(self)
        pruner = self.selection.pruner
        layers = get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase, list(pruner.layer_sources))
        self.audit = pruner.audit = prepare_audit(
            self.options, layers, self.operations, self.counters, self.reporter, self.max_num_reqs, self.device
        )

    def set_attn(self, model_state, kv_cache_config, block_tables, target_input_buffers, target_attn_groups) -> None:
        super().set_attn(model_state, kv_cache_config, block_tables, target_input_buffers, target_attn_groups)
        if len(kv_cache_config.kv_cache_groups) != 1:
            raise ValueError(
                f"specattn needs draft and target in one KV-cache group, but vLLM made "
                f"{len(kv_cache_config.kv_cache_groups)}: models with mixed attention types are not supported"
            )
        self.selection.attach(target_attn_groups)
        compat.watch_new_requests(model_state, "speculator", self._enter)

    def count_from_zero(self) -> None:
        super().count_from_zero()
        if self.audit is not None:
            self.audit.reset()

    def propose(self, input_batch, *args, dummy_run: bool = False, **kwargs) -> torch.Tensor:
        if self.audit is not None:
            # The target's step is over, and this round stores the selections for its next step.
            if dummy_run:
                self.audit.discard()
            else:
                self.audit.fold()
        return super().propose(input_batch, *args, dummy_run=dummy_run, **kwargs)

    def _enter(self, slot: int, request: Any) -> None:
        """A new or resumed request gets a slot."""
        self.selection.store.hold(slot, asks_for_exactness(request.sampling_params))

    def _round_is_dense(self, batch: InputBatch) -> None:
        self.selection.store.clear(batch.idx_mapping)
        self.selection.store.note_small_batch(batch.idx_mapping_np, True)

    def _round_records(self, batch: InputBatch) -> None:
        self.selection.store.note_small_batch(batch.idx_mapping_np, False)

    def _round(
        self,
        batch,
        attn_metadata,
        slot_mappings,
        last_hidden_states,
        aux_hidden_states,
        num_sampled,
        *args,
        recording: bool,
        **kwargs,
    ) -> torch.Tensor:
        """vLLM's `propose`, with captured attention and a stored selection."""
        if recording:
            # A row that sampled no token is inside its prompt, or it is padding: its next step is no verification.
            # Nothing is selected for requests that asked for exactness.
            slots = batch.idx_mapping[: batch.num_reqs]
            wanted = (num_sampled[: batch.num_reqs] > 0) & ~self.selection.store.exact[slots]
            self.selection.capture.begin_round(wanted)
        given = attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_sampled
        drafts = super()._round(batch, *given, *args, recording=recording, **kwargs)
        if recording:
            self.selection.store.put(slots, *self.selection.capture.select())
        return drafts

    def _build_attn_metadata(self, num_reqs: int, *args, step: int, **kwargs) -> dict[str, Any] | None:
        metadata = super()._build_attn_metadata(num_reqs, *args, step=step, **kwargs)
        if self._recording and metadata is not None:
            self._begin_step(num_reqs, first=step == 0)
            for layer_metadata in metadata.values():
                layer_metadata.hook = self.selection.capture
        return metadata

    def _begin_step(self, num_reqs: int, *, first: bool) -> None:
        capture = self.selection.capture
        if first:
            # A request's rejected tokens follow its sampled row, so the sampled row is not always its last one.
            rows = self.last_token_indices[:num_reqs]
            capture.begin_step(0, rows, self.expanded_positions[rows] + 1)
        else:
            capture.begin_step(capture.step + 1, None, None)

    def _run_model(self, *args, **kwargs) -> torch.Tensor:
        hidden_states = super()._run_model(*args, **kwargs)
        if self._recording:
            self.selection.capture.end_step()
        return hidden_states
