"""A target that drafts for itself: no second set of weights, no second KV cache."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch

from specattn_vllm.selection.clock import Clock
from specattn_vllm.speculation.rounds import RoundSpeculator
from specattn_vllm.speculation.self_wiring import SelfSelection, from_attention, from_window, prepare_self


class SelfSpeculator(RoundSpeculator):
    """Drafts with the target's own weights and cache, over a selection of the context (Vegas, arXiv 2602.07223).

    The cache holds every accepted token when drafting begins. So a draft step is a plain decoding step, without the
    expanded first step of a separate draft model. The next verification is dense and overwrites the keys and values of
    the draft steps. So the cache contents and the accepted tokens are the target's own.
    """

    num_extra_query_per_req = 0
    make_selection = staticmethod(from_attention)
    selection: SelfSelection | None

    def load_draft_model(self, target_model: torch.nn.Module, target_attn_layer_names: set[str]) -> torch.nn.Module:
        return target_model

    def load_model(self, target_model: torch.nn.Module) -> None:
        super().load_model(target_model)
        self.selection = prepare_self(self, self.make_selection)
        self.clock = Clock(self.operations, self.counters.on_device("draft_selection_ns"))

    def set_attn(self, model_state, kv_cache_config, block_tables, target_input_buffers, target_attn_groups) -> None:
        # vLLM makes the speculator's metadata builders for the layers in draft_attn_layer_names. They are the target's
        # layers here, but only during this call: otherwise vLLM would give them a second KV cache.
        self.draft_attn_layer_names = set(get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase))
        try:
            super().set_attn(model_state, kv_cache_config, block_tables, target_input_buffers, target_attn_groups)
        finally:
            self.draft_attn_layer_names = set()
        if len(kv_cache_config.kv_cache_groups) != 1:
            raise ValueError(
                f"specattn needs all layers in one KV-cache group, but vLLM made "
                f"{len(kv_cache_config.kv_cache_groups)}: models with mixed attention types are not supported"
            )
        self.selection.attach(target_attn_groups)

    def _round(
        self,
        batch: InputBatch,
        attn_metadata,
        slot_mappings,
        last_hidden_states,
        aux_hidden_states,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        *,
        recording: bool,
        dp_sync_state=None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        num_speculative_tokens: int | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """K decoding steps of the target: sparse in a recorded round, else dense. Fewer if vLLM asks for fewer drafts:
        it does not use what is in the other columns."""
        rows = batch.num_reqs
        asked = self.num_speculative_steps
        # With data parallelism every rank must run the model as often as the others do.
        if num_speculative_tokens is not None and self.dp_size == 1:
            asked = num_speculative_tokens
        if asked == 0:
            return self.draft_tokens[:rows]
        self._copy_request_inputs(rows, batch.idx_mapping, temperature, seeds, dummy_run=dummy_run)
        committed = batch.seq_lens[:rows] - num_rejected[:rows].int()
        # Context length in each step, with the step's own token.
        steps = torch.arange(1, asked + 1, dtype=torch.int32, device=self.device)
        step_lens = (committed + steps[:, None]).clamp_(max=self.max_model_len)
        if recording:
            self._select(num_sampled[:rows] > 0, committed, step_lens)
        self.input_buffers.query_start_loc[: rows + 1].copy_(self.arange_gpu[: rows + 1])
        across_dp = None if dp_sync_state is None else dp_sync_state.num_tokens_across_dp
        tokens = last_sampled.view(-1)[self.idx_mapping[:rows]]
        for step in range(asked):
            self.input_buffers.input_ids[:rows].copy_(tokens)
            torch.sub(step_lens[step], 1, out=self.input_buffers.positions[:rows])
            self.input_buffers.seq_lens[:rows].copy_(step_lens[step])
            attention, slots = None, None
            if not (dummy_run and skip_attn_for_dummy_run):
                attention, slots = self._step_metadata(batch, step, recording)
            hidden_states = self._run_model(
                self.input_buffers.input_ids[:rows], self.input_buffers.positions[:rows], attention, slots, across_dp
            )
            self.current_draft_step.fill_(step)
            tokens = self.sample_draft(
                hidden_states[:rows],
                self.input_buffers.positions[:rows],
                self.idx_mapping[:rows],
                self.temperature,
                self.seeds,
                self.current_draft_step,
                self.draft_logits,
            )
            self.draft_tokens[:rows, step] = tokens
        return self.draft_tokens[:rows]

    def _select(self, wanted: torch.Tensor, committed: torch.Tensor, step_lens: torch.Tensor) -> None:
        """Make the page tables of a round. A row that sampled no token is inside its prompt, or it is padding: its
        drafts are discarded, and it reads nothing."""
        seen = torch.where(wanted, step_lens, 0)
        block_table = self.block_tables.input_block_tables[0][: wanted.shape[0]]
        with self.clock:
            bits, prefix_lens = self.selection.source.select(wanted, committed)
            kept = self.selection.tables.build(bits.transpose(0, 1), prefix_lens, seen, block_table)
        # One table serves all heads, and may serve several layers.
        layers, heads = len(self.selection.tables.layer_sources), self.selection.num_kv_heads
        self.counters.on_device("draft_kv_full").add_(seen.sum(dtype=torch.int64), alpha=layers * heads)
        read = kept.sum(dtype=torch.int64)
        self.counters.on_device("draft_kv_read").add_(read, alpha=layers // kept.shape[1] * heads)

    def _step_metadata(self, batch: InputBatch, step: int, recording: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        rows = batch.num_reqs
        positions = self.input_buffers.positions[:rows]
        slots = self.block_tables.compute_slot_mappings(
            self.idx_mapping[:rows], self.input_buffers.query_start_loc[: rows + 1], positions, rows
        )
        metadata = self._build_uniform_attn_metadata(
            batch_desc=BatchExecutionDescriptor(
                cg_mode=CUDAGraphMode.NONE, num_tokens=rows, num_reqs=rows, uniform_token_count=1
            ),
            num_reqs=rows,
            num_query_per_req=1,
            seq_lens_cpu_upper_bound=batch.seq_lens_cpu_upper_bound,
            step=step + 1,
        )
        if recording:
            plan = self.selection.tables.plan(step)
            for layer_metadata in metadata.values():
                layer_metadata.sparse = plan
        return metadata, build_slot_mappings_by_layer(slots, self.kv_cache_config)


class WindowSpeculator(SelfSpeculator):
    """Drafts over the first and the last tokens of the context (StreamingLLM, arXiv 2309.17453)."""

    make_selection = staticmethod(from_window)
