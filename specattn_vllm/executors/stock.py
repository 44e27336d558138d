"""vLLM's own attention and cache write with our signatures, for the `triton` executor on CUDA."""

from __future__ import annotations

import functools

import torch


def dense_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    max_query_len: int,
    max_seq_len: int,
    sinks: torch.Tensor | None = None,
) -> None:
    """Dense causal attention by vLLM's own Triton kernel; arguments as in `specattn_vllm.executors`."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    key_cache, value_cache = kv_cache.transpose(1, 2).split(query.shape[-1], dim=-1)
    unified_attention(
        q=query,
        k=key_cache,
        v=value_cache,
        out=out,
        cu_seqlens_q=query_start_loc,
        max_seqlen_q=max_query_len,
        seqused_k=seq_lens,
        max_seqlen_k=max_seq_len,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1),
        block_table=block_table,
        softcap=0,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        sinks=sinks,
    )


@functools.cache
def _one(device: torch.device) -> torch.Tensor:
    """The scale 1, for a cache that is not quantised."""
    return torch.ones((), dtype=torch.float32, device=device)


def write_kv(key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Write new keys and values by vLLM's own CUDA kernel; arguments as in the executors' `write_kv`."""
    from vllm import _custom_ops as ops

    key_cache, value_cache = kv_cache.transpose(1, 2).split(key.shape[-1], dim=-1)
    one = _one(key.device)
    ops.reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping, "auto", one, one)
