"""FlashAttention 3, as vLLM ships it, over vLLM's cache, seen as pages of one token.

A page table of token ids turns FA3's paged attention into token-sparse attention: K and V are a view of vLLM's cache in
which every row of 2D elements starts a page of one token. If all heads share a selection, each request needs one table,
and FA3 reaches the heads by their stride. With selections per KV head, the batch is requests x KV heads: each pair has
its own table and one group of query heads ("head-folded").

No schedule is computed in advance. FA3 makes its schedule on the device in each call, from the lengths of that call. So
page tables and lengths may change between replays of a captured CUDA graph.
"""

from __future__ import annotations

import functools

import torch

from specattn_vllm.executors.stock import scale_tensor
from specattn_vllm.kernels.attention import contracts
from specattn_vllm.kernels.contracts import FP8, expect
from specattn_vllm.selection.pages import page_strides, token_pages


def unavailable() -> str | None:
    """Why FA3 does not run on this machine's GPU, with the remedy; None if it does."""
    try:
        from vllm.vllm_flash_attn import flash_attn_interface as interface
    except ImportError as error:
        return f"vLLM's FlashAttention is not installed ({error}): install vLLM's CUDA build"
    supported, reason = interface._is_fa3_supported()
    return None if supported else f"{reason}"


@functools.cache
def _flash_attention():
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    return functools.partial(flash_attn_varlen_func, fa_version=3, causal=True)


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
    """Dense causal attention on vLLM's own blocks; arguments as in `specattn_vllm.executors`. With an 8-bit cache, FA3
    wants queries of 8 bits too: they are rounded, as in vLLM's own backend."""
    if kv_cache.dtype == FP8:
        query, scale = _as_fp8(query, query_scale), scale * query_scale
    size = query.shape[-1]
    blocks, heads, tokens, _ = kv_cache.shape
    block, head, token = (stride * 2 * size for stride in page_strides(kv_cache))
    # FA3 passes strides to the tensor memory accelerator, which refuses stride 0. A dimension of size 1 may have it.
    strides = (block or 2 * size, token or 2 * size, head or 2 * size, 1)
    pages = kv_cache.as_strided((blocks, tokens, heads, 2 * size), strides)
    _flash_attention()(
        q=query,
        k=pages[..., :size],
        v=pages[..., size:],
        out=out,
        cu_seqlens_q=query_start_loc,
        max_seqlen_q=max_query_len,
        seqused_k=seq_lens,
        max_seqlen_k=max_seq_len,
        softmax_scale=scale,
        block_table=block_table,
        s_aux=sinks,
        softcap=soft_cap or 0.0,
    )


def _as_fp8(query: torch.Tensor, scale: float) -> torch.Tensor:
    from vllm import _custom_ops as ops

    flat, _ = ops.scaled_fp8_quant(query.flatten(1).contiguous(), scale_tensor(query.device, scale))
    return flat.view(query.shape)


def sparse_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    page_table: torch.Tensor,
    kept: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    max_query_len: int,
    lse: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> None:
    """Attention over the pages of a table. The contract is that of `kernels/attention/sparse_attention.py`, with three
    differences: a (request, head) with kept = 0 gets zeros, while our kernel leaves its rows unchanged; FA3 refuses
    fp32; `query` has no padding, unless every request of a CUDA graph's batch has max_query_len tokens.
    """
    contracts.sparse_attention(query, kv_cache, page_table, kept, query_start_loc, out, max_query_len, lse)
    expect(kv_cache.dtype == query.dtype, "kv_cache", kv_cache.dtype, f"{query.dtype} (FA3 reads fp8 by fp8 queries)")
    tokens, query_heads, size = query.shape
    heads, groups = kv_cache.shape[1], page_table.shape[1]
    if groups == 1:
        _attend(
            query,
            token_pages(kv_cache, heads),
            page_table[:, 0],
            kept[:, 0],
            query_start_loc,
            scale,
            out,
            max_query_len,
            lse,
            soft_cap,
        )
        return
    order, starts = _head_major(query_start_loc, tokens, kept.shape[0], heads, max_query_len)
    split = (tokens * heads, query_heads // heads, size)
    folded_out = torch.empty(split, dtype=out.dtype, device=out.device)
    folded_lse = None if lse is None else torch.empty(split[:2], dtype=lse.dtype, device=lse.device)
    folded = query.reshape(split)[order]
    _attend(
        folded,
        token_pages(kv_cache, 1),
        page_table.flatten(0, 1),
        kept.flatten(),
        starts,
        scale,
        folded_out,
        max_query_len,
        folded_lse,
        soft_cap,
    )
    # Row i of the folded result is row order[i] of (token, head).
    out.view(split).index_copy_(0, order, folded_out)
    if lse is not None:
        lse.view(split[:2]).index_copy_(0, order, folded_lse)


def _attend(query, pages, page_table, kept, query_start_loc, scale, out, max_query_len, lse, soft_cap) -> None:
    size = query.shape[-1]
    result = _flash_attention()(
        q=query,
        k=pages[..., :size],
        v=pages[..., size:],
        out=out,
        cu_seqlens_q=query_start_loc,
        max_seqlen_q=max_query_len,
        seqused_k=kept,
        max_seqlen_k=page_table.shape[-1],
        softmax_scale=scale,
        block_table=page_table,
        return_softmax_lse=lse is not None,
        softcap=soft_cap or 0.0,
    )
    if lse is not None:
        lse.copy_(result[1].transpose(0, 1))


def _head_major(
    query_start_loc: torch.Tensor, tokens: int, rows: int, heads: int, max_query_len: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """An order of the (token, head) rows in which the rows of each (request, head) are contiguous.

    Returns order [T * H] int64 (order[i] = token * H + head) and starts [R * H + 1] int32, the start of each pair.
    """
    device = query_start_loc.device
    if tokens == rows * max_query_len:
        # All requests have the same number of tokens, padded ones too, and the host knows it.
        order = torch.arange(tokens * heads, device=device).view(rows, max_query_len, heads).transpose(1, 2).flatten()
        return order, torch.arange(0, tokens * heads + 1, max_query_len, dtype=torch.int32, device=device)
    lens = query_start_loc.diff()
    head = torch.arange(heads, device=device)
    starts = (query_start_loc[:-1, None] * heads + head * lens[:, None]).flatten()
    starts = torch.cat((starts, query_start_loc[-1:] * heads)).int()
    token = torch.arange(tokens, device=device)
    row = torch.searchsorted(query_start_loc[1:].contiguous(), token, right=True).clamp_(max=rows - 1)
    where = query_start_loc[row, None] * heads + head * lens[row, None] + (token - query_start_loc[row])[:, None]
    # Tokens after the last request are padding. They keep their place, after the rows of all requests.
    where = torch.where(token[:, None] < query_start_loc[-1], where, token[:, None] * heads + head)
    order = torch.empty(tokens * heads, dtype=torch.int64, device=device)
    order[where.flatten().long()] = torch.arange(tokens * heads, device=device)
    return order, starts
