"""A draft model whose own queries choose the KV entries that it reads, over a sketch of its keys. It is lossless: only
drafts change."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from specattn_vllm.sketch.drafting import DraftSketch, prepare_drafting
from specattn_vllm.speculation.announce import announce_buffers
from specattn_vllm.speculation.rounds import RoundSpeculator

logger = init_logger("vllm.specattn")


class SketchSpeculator(RoundSpeculator):
    """Drafts with a draft model as vLLM does. During vLLM's `propose` it marks the metadata of each draft step: the
    layers choose in the first step of a round, and reuse that selection in the other steps."""

    selection: DraftSketch | None

    def load_model(self, target_model: torch.nn.Module) -> None:
        super().load_model(target_model)
        layers = get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase)
        layers = {name: layer for name, layer in layers.items() if name in self.draft_attn_layer_names}
        # In the first step of a round a row has K verified drafts, the target's own token, and one more token.
        self.selection = prepare_drafting(self, layers, self.model, self.num_speculative_steps + 2)
        announce_buffers(self, self.selection.nbytes)
        if self.crossover_tokens:
            logger.info("specattn: drafting is dense in batches of fewer than %d tokens", self.crossover_tokens)
        logger.info(
            "specattn: draft steps read %s, chosen in the first step of a round by its own queries over a %d-bit copy "
            "of the draft's keys",
            self.selection.sketch.budget.amount,
            self.options.sketch_bits,
        )

    def _round(self, batch, *args, recording: bool, **kwargs) -> torch.Tensor:
        drafts = super()._round(batch, *args, recording=recording, **kwargs)
        if recording and self.num_speculative_steps == 1:  # `_multi_step_decode` does not run then
            self._count_reads(batch.num_reqs)
        return drafts

    def _build_attn_metadata(self, num_reqs: int, *args, step: int, **kwargs) -> dict[str, Any] | None:
        metadata = super()._build_attn_metadata(num_reqs, *args, step=step, **kwargs)
        if not self._recording or not metadata:
            return metadata
        shared = next(iter(metadata.values()))
        if step == 0:
            starts = torch.from_numpy(kwargs["query_start_loc_np"])
            first = shared.query_start_loc[:num_reqs]
            self._query_lens = shared.query_start_loc[1 : num_reqs + 1] - first
            chosen = self.selection.begin(shared, starts, self.last_token_indices[:num_reqs] + 1 - first)
        else:
            chosen = self.selection.follow(shared)
        for layer_metadata in metadata.values():
            layer_metadata.choice = chosen
        return metadata

    def _multi_step_decode(self, input_batch, num_rejected, num_reqs, *args, **kwargs) -> None:
        super()._multi_step_decode(input_batch, num_rejected, num_reqs, *args, **kwargs)
        if self._recording:
            self._count_reads(num_reqs)

    def _count_reads(self, num_reqs: int) -> None:
        self.selection.count(self.input_buffers.seq_lens[:num_reqs], self._query_lens, self.num_speculative_steps)
