"""The attention metadata of one step: built once per step, read by every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from vllm.v1.attention.backend import AttentionMetadata

if TYPE_CHECKING:
    from specattn_vllm.selection.own_choice import ChoiceStep
    from specattn_vllm.selection.plan import SparsePlan


class LayerHook(Protocol):
    """Called in each layer of a step before it attends. It may capture the attention, or attend instead."""

    def attend(
        self,
        layer_name: str,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: SpecAttnMetadata,
        scale: float,
        out: torch.Tensor,
    ) -> bool:
        """query, out [T, Hq, D]; kv_cache [B, H, N, 2D]. Returns whether `out` is filled."""
        ...


@dataclass
class SpecAttnMetadata(AttentionMetadata):
    """vLLM's common metadata, and which KV entries the rows of this step read.

    On the device: query_start_loc [R+1] int32, seq_lens [R] int32, block_table [R, blocks] int32.
    """

    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    sparse: SparsePlan | None = None
    """Set for a target step with verification rows; the rows after them are dense."""
    choice: ChoiceStep | None = None
    """Set for a step whose short rows choose for themselves in each layer; the rows after them are dense."""
    hook: LayerHook | None = None
    """Set for steps whose attention is captured (of a draft model, or of a target that drafts for itself), and for
    steps in which an evaluation attends instead."""
