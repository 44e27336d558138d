"""vLLM's own attention and cache write with our signatures, for the `triton` executor on CUDA."""

from __future__ import annotations

import functools

import torch

from specattn_vllm.kernels.contracts import FP8


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
    query_scale: float = 1.0,
    soft_cap: float | None = None,
) -> None:
    """Dense causal attention by vLLM's own Triton kernel; arguments as in `specattn_vllm.executors`."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    from vllm.v1.kv_cache_interface import KVQuantMode

    fp8 = kv_cache.dtype == FP8
    # `scale` has the keys' scale already, and the caller multiplies by that of the values.
    one = scale_tensor(query.device) if fp8 else None
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
        softcap=soft_cap or 0,
        q_descale=None,
        k_descale=one,
        v_descale=one,
        sinks=sinks,
        kv_quant_mode=KVQuantMode.FP8_PER_TENSOR if fp8 else KVQuantMode.NONE,
    )


@functools.cache
def scale_tensor(device: torch.device, scale: float = 1.0) -> torch.Tensor:
    """A scale as vLLM's kernels take it."""
    return torch.full((), scale, dtype=torch.float32, device=device)


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """Write new keys and values by vLLM's own CUDA kernel; arguments as in the executors' `write_kv`."""
    from vllm import _custom_ops as ops

    kind = "auto"
    if kv_cache.dtype == FP8:
        kind, kv_cache = "fp8", kv_cache.view(torch.uint8)
    key_cache, value_cache = kv_cache.transpose(1, 2).split(key.shape[-1], dim=-1)
    scales = scale_tensor(key.device, key_scale), scale_tensor(key.device, value_scale)
    ops.reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping, kind, *scales)
