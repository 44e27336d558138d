"""Builds each step's metadata; for the target's builder, that includes pruning the page tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata

from specattn_vllm import compat
from specattn_vllm.backend.metadata import SpecAttnMetadata

if TYPE_CHECKING:
    from specattn_vllm.selection.pruner import Pruner, SparsePlan


class SpecAttnMetadataBuilder(AttentionMetadataBuilder[SpecAttnMetadata]):
    """One per attention group; the speculator hands the target's builders a pruner, all others stay plain."""

    # The attention of a step branches on host data (how many rows verify), which a full graph would freeze.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        compat.prepare_cpu_worker()
        self.pruner: Pruner | None = None

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
        )

    def _prune(self, common: CommonAttentionMetadata) -> SparsePlan | None:
        # The draft's own steps carry no slots, and neither do profiling runs.
        if self.pruner is None or common.req_idx is None or common.is_prefilling is None:
            return None
        rows = len(common.req_idx)
        prefilling = common.is_prefilling[:rows]
        return self.pruner.prune(
            slots=async_tensor_h2d(common.req_idx, device=self.device, dtype=torch.int64),
            prefilling=async_tensor_h2d(prefilling, device=self.device),
            prefilling_cpu=prefilling,
            query_start_loc=common.query_start_loc[: rows + 1],
            query_start_loc_cpu=common.query_start_loc_cpu[: rows + 1],
            seq_lens=common.seq_lens[:rows],
            block_table=common.block_table_tensor[:rows],
        )
