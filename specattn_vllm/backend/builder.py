"""Builds each step's metadata. The target's builder also makes the pruned page tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata

from specattn_vllm import compat, executors
from specattn_vllm.backend.metadata import LayerHook, SpecAttnMetadata
from specattn_vllm.options import SpecAttnOptions

if TYPE_CHECKING:
    from specattn_vllm.backend.target_choice import TargetChoice
    from specattn_vllm.selection.own_choice import ChoiceStep
    from specattn_vllm.selection.plan import SparsePlan
    from specattn_vllm.selection.pruner import Pruner
    from specattn_vllm.selection.target_capture import TargetCapture


class SpecAttnMetadataBuilder(AttentionMetadataBuilder[SpecAttnMetadata]):
    """One builder per attention group. The speculator gives the target's builder a pruner, or a capture if the target
    drafts for itself. Other builders have neither."""

    # No metadata changes between draft steps: every operation reads its lengths from vLLM's own buffers.
    supports_draft_decode_metadata_update: ClassVar[bool] = True

    substitute: Callable[[CommonAttentionMetadata], LayerHook | None] | None = None
    """Only set by evaluations: makes the hook that replaces all other attention in a step."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        compat.prepare_cpu_worker()
        self.pruner: Pruner | None = None
        self.target_capture: TargetCapture | None = None
        layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase, layer_names)
        impls = [layer.impl for layer in layers.values()]
        for impl in impls:
            if impl.choice is not None:
                # vLLM allocates the cache twice, and makes new builders before each allocation.
                impl.choice.forget_cache()
        self.target_choice: TargetChoice | None = next((i.target_choice for i in impls if i.target_choice), None)

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec) -> AttentionCGSupport:
        """Full CUDA graphs for uniform batches only. Rows read through page tables, which `build` makes before each
        step, outside the graph. A mixed batch is split on the host, and a graph would freeze that split."""
        device = torch.device(vllm_config.device_config.device)
        if device.type != "cuda":
            return AttentionCGSupport.NEVER
        options = SpecAttnOptions.from_vllm(vllm_config)
        operations = executors.of_engine(options, device, vllm_config)
        return AttentionCGSupport.UNIFORM_BATCH if operations.graphs else AttentionCGSupport.NEVER

    def update_draft_decode_metadata(self, metadata: SpecAttnMetadata) -> None:
        """Nothing to do: see `supports_draft_decode_metadata_update`."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SpecAttnMetadata:
        common = common_attn_metadata
        return SpecAttnMetadata(
            num_reqs=common.num_reqs,
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            sparse=self._prune(common),
            choice=self._choose(common),
            hook=self._hook(common),
        )

    def _choose(self, common: CommonAttentionMetadata) -> ChoiceStep | None:
        # Draft steps and profiling runs have no slots.
        if self.target_choice is None or common.req_idx is None or common.is_prefilling is None:
            return None
        return self.target_choice.begin(common)

    def _hook(self, common: CommonAttentionMetadata) -> LayerHook | None:
        if self.substitute is not None:
            return self.substitute(common)
        # Profiling runs have no slots, and their attention is meaningless.
        if self.target_capture is None or common.req_idx is None:
            return None
        rows = common.num_reqs
        starts = common.query_start_loc_cpu[: rows + 1]
        return self.target_capture.begin(common.query_start_loc[: rows + 1], common.seq_lens[:rows], starts)

    def _prune(self, common: CommonAttentionMetadata) -> SparsePlan | None:
        # Draft steps and profiling runs have no slots.
        if self.pruner is None or common.req_idx is None or common.is_prefilling is None:
            return None
        # The batch of a full CUDA graph has padded rows; their tables must be empty.
        real, rows = len(common.req_idx), common.num_reqs
        slots = np.full(rows, -1, dtype=np.int64)
        slots[:real] = common.req_idx
        prefilling = torch.zeros(rows, dtype=torch.bool)
        prefilling[:real] = common.is_prefilling[:real]
        return self.pruner.prune(
            slots=async_tensor_h2d(slots, device=self.device, dtype=torch.int64),
            slots_cpu=slots,
            prefilling=async_tensor_h2d(prefilling, device=self.device),
            prefilling_cpu=prefilling,
            query_start_loc=common.query_start_loc[: rows + 1],
            query_start_loc_cpu=common.query_start_loc_cpu[: rows + 1],
            seq_lens=common.seq_lens[:rows],
            block_table=common.block_table_tensor[:rows],
        )
