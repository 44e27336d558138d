"""Sparse attention through xformers, for NVIDIA GPUs without FlashAttention 3.

xformers' Triton split-K forward reads vLLM's cache through a block table (`PagedBlockDiagonalCausalWithOffset...`). So
selections are made of whole blocks, and `kernels/selection/block_tables.py` makes the tables. Three properties of
xformers shape this module:

- Causal masks need the same number of query tokens from every request, at most 16. `pack_queries` brings ragged rows to
  the length of the longest, and `unpack_outputs` undoes it.
- xformers' constructors of a bias take lengths as host lists. Here lengths stay on the device: the bias is assembled
  from its parts, and the forward reads only the ends of the host lists. So the host never waits, and a CUDA graph can
  hold the forward.
- `op.apply` is called without the checks of `memory_efficient_attention`. These refuse a build whose C++ part does not
  fit torch, but the Triton forward does not use that part. This module makes the other checks itself.

Triton compiles the forward again for each number of rows and each table width. With CUDA graphs, both come from a fixed
set. Without, expect a pause whenever a new number of requests occurs.
"""

from __future__ import annotations

import functools
import re
from importlib import metadata
from types import SimpleNamespace

import torch

from specattn_vllm.kernels.attention import contracts
from specattn_vllm.kernels.contracts import expect

OLDEST = (0, 0, 35)
MAX_QUERY_LEN = 16
MAX_BLOCK_M = 64

# Splits have fixed positions in the table, which is as wide as the longest sequence may be. If a tenth is kept, nine of
# ten splits have no keys, and each costs a write and a read of an empty result. Not yet measured: SPLIT_TOKENS
# 256..4096, PROGRAMS 512..8192.
SPLIT_TOKENS = 512
PROGRAMS = 2048
MAX_SPLITS = 64
NUM_WARPS = 4
# Keys per step (at most a block) -> depth of the pipeline. Not yet measured: 1..5.
NUM_STAGES = {16: 4, 32: 3, 64: 2}


def unavailable() -> str | None:
    """Why this executor does not run here, with the remedy; None if it does."""
    remedy = "pip install 'xformers>={}.{}.{}'".format(*OLDEST)
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "needs an NVIDIA GPU, and torch sees none"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs a GPU of compute capability 8.0 or later (Ampere)"
    try:
        version = metadata.version("xformers")
    except metadata.PackageNotFoundError:
        return f"xformers is not installed: {remedy}"
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < OLDEST:
        return f"xformers {version} is too old: {remedy}"
    try:
        parts = _xformers()
    except (ImportError, AttributeError) as error:
        return f"xformers {version} cannot be used ({error}): {remedy}"
    if parts.FwOp.OPERATOR is None:
        return "xformers' Triton kernels are switched off: unset XFORMERS_FORCE_DISABLE_TRITON"
    return None


@functools.cache
def _xformers() -> SimpleNamespace:
    """The parts of xformers that this module uses. The two with an underscore are not public."""
    from xformers.ops.fmha import attn_bias, common, triton_splitk

    return SimpleNamespace(
        Bias=attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask,
        QueryLens=attn_bias._SeqLenInfo,
        KeyLens=attn_bias._PaddedSeqLenInfo,
        Inputs=common.Inputs,
        FwOp=triton_splitk.FwOp,
    )


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
    """Causal attention over the blocks of a table; launches on the current stream and never waits for the device.

    As `specattn_vllm.kernels.attention.sparse_attention`, with these differences. page_table [R, 1, width] lists blocks
    of the cache in ascending order of position. kept [R, 1] counts the tokens in these blocks; the last q_len are the
    new ones (`build_block_tables`). dtypes are float16 and bfloat16. The cache's block size is a multiple of 16, and
    its tokens have equal distances across blocks, as in the LBNHC layout. max_query_len is at most 16. The work is
    split evenly over the table's width, so a table that is wider than the longest sequence is correct but slow.
    """
    contracts.sparse_attention(query, kv_cache, page_table, kept, query_start_loc, out, max_query_len, lse)
    expect(page_table.shape[1] == 1, "page_table", f"{page_table.shape[1]} groups", "1: blocks hold all heads")
    expect(soft_cap is None, "soft_cap", soft_cap, "None: xformers has none")
    expect(query.dtype != torch.float32, "query", query.dtype, "torch.float16 or torch.bfloat16")
    expect(max_query_len <= MAX_QUERY_LEN, "max_query_len", max_query_len, f"at most {MAX_QUERY_LEN}")
    rows, _, width = page_table.shape
    if rows == 0 or width == 0 or query.shape[0] == 0:
        return
    _, query_heads, size = query.shape
    heads, block_size = kv_cache.shape[1:3]
    group = query_heads // heads
    keys, values = _as_sequence(kv_cache, group)
    packed = query.new_empty(rows, max_query_len, query_heads, size)
    lengths = kept[:, 0] if kept.stride(0) == 1 else kept[:, 0].clone(memory_format=torch.contiguous_format)
    inputs = _xformers().Inputs(
        query=packed.view(1, rows * max_query_len, heads, group, size),
        key=keys,
        value=values,
        attn_bias=_bias(page_table[:, 0], lengths, query_start_loc, max_query_len, block_size),
        scale=scale,
    )
    op = _operator(rows * heads, max_query_len * group, width * block_size, block_size)
    pack_queries(query, query_start_loc, packed)
    result, context = op.apply(inputs, needs_gradient=lse is not None)
    unpack_outputs(
        result.view(rows, max_query_len, query_heads, size),
        None if lse is None else context.lse.reshape(query_heads, rows * max_query_len),
        query_start_loc,
        lengths,
        out,
        lse,
    )


def _tokens(query_start_loc: torch.Tensor, rows_each: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which token each of the `rows_each` rows of a request is, and whether it is one, [R, M] each. A request's tokens
    are the last of its rows, as causal attention aligned to the bottom right expects."""
    token = query_start_loc[1:, None].long() - rows_each + torch.arange(rows_each, device=query_start_loc.device)
    return token, token >= query_start_loc[:-1, None]


def pack_queries(query: torch.Tensor, query_start_loc: torch.Tensor, packed: torch.Tensor) -> None:
    """packed [R, M, Hq, D] = the tokens of each request, zeros in the rows before them. query [T, Hq, D];
    query_start_loc [R + 1] int32, at most M tokens for each request. Does not wait for the device."""
    token, there = _tokens(query_start_loc, packed.shape[1])
    packed.copy_(torch.where(there[..., None, None], query[token.clamp(min=0)], 0.0))


def unpack_outputs(
    packed: torch.Tensor,
    packed_lse: torch.Tensor | None,
    query_start_loc: torch.Tensor,
    kept: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Write the tokens' rows of packed [R, M, Hq, D] to out [T, Hq, D], and those of packed_lse [Hq, R * M] to lse
    [T, Hq]. Requests with kept [R] int32 of 0 or less keep what `out` and `lse` hold. Does not wait for the device."""
    token, there = _tokens(query_start_loc, packed.shape[1])
    # Rows that are no tokens go to a row behind the last: to leave them out, their number would have to be known.
    target = torch.where(there & (kept > 0)[:, None], token, out.shape[0]).flatten()
    pairs = [(out, packed.flatten(0, 1))]
    if lse is not None and packed_lse is not None:
        pairs.append((lse, packed_lse.T))
    for to, values in pairs:
        longer = torch.cat((to, to[:1]))
        longer[target] = values.to(to.dtype)
        to.copy_(longer[:-1])


def _as_sequence(kv_cache: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as xformers takes them, [1, B * N, H, Hq / H, D] each. Views; query heads have stride 0."""
    blocks, heads, block_size, row = kv_cache.shape
    per_block, per_head, per_token = kv_cache.stride()[:3]
    expect(block_size % 16 == 0, "kv_cache", f"block size {block_size}", "a multiple of 16 (--block-size)")
    if blocks > 1 and per_block != block_size * per_token:
        raise ValueError(
            f"kv_cache: got strides {kv_cache.stride()} for shape {tuple(kv_cache.shape)}, wanted tokens at equal "
            "distances across blocks: the xformers executor needs the LBNHC layout (VLLM_KV_CACHE_LAYOUT)"
        )
    size = row // 2
    shape = (1, blocks * block_size, heads, group, size)
    strides = (blocks * block_size * per_token, per_token, per_head, 0 if group > 1 else per_head, 1)
    return kv_cache.as_strided(shape, strides), kv_cache[..., size:].as_strided(shape, strides)


def _bias(blocks: torch.Tensor, lengths: torch.Tensor, starts: torch.Tensor, query_len: int, block_size: int) -> object:
    """The mask of `query_len` tokens per row over the first `lengths` tokens of its blocks.

    It is assembled by hand, because the constructors copy lists from the host. The forward reads `seqlen` on the
    device, and `max_seqlen` and `min_seqlen` of the queries on the host. The other fields are consistent but unused.
    """
    parts = _xformers()
    rows, width = blocks.shape
    padding = width * block_size
    return parts.Bias(
        q_seqinfo=parts.QueryLens(
            seqstart=starts,
            max_seqlen=query_len,
            min_seqlen=query_len,
            seqstart_py=list(range(0, (rows + 1) * query_len, query_len)),
        ),
        k_seqinfo=parts.KeyLens(
            seqstart=starts,
            max_seqlen=padding,
            min_seqlen=0,
            seqstart_py=list(range(0, (rows + 1) * padding, padding)),
            seqlen=lengths,
            seqlen_py=[padding] * rows,
            padding=padding,
        ),
        block_tables=blocks,
        page_size=block_size,
    )


def _operator(tiles: int, query_rows: int, tokens: int, block_size: int) -> type:
    """The forward with its launch parameters, which depend on shapes only: `tiles` (request, KV head) pairs of
    `query_rows` rows over a table of `tokens` tokens. On Ada and newer GPUs, xformers sets block_m and warps itself for
    head size 128."""
    block_m = min(max(16, 1 << (query_rows - 1).bit_length()), MAX_BLOCK_M)
    block_n = next(n for n in (64, 32, 16) if block_size % n == 0)
    splits = min(PROGRAMS // (tiles * -(-query_rows // block_m)), tokens // SPLIT_TOKENS, MAX_SPLITS)
    # A power of two limits the number of compiled variants.
    return _xformers().FwOp.get_operator(
        1 << (max(splits, 1).bit_length() - 1),
        block_m=block_m,
        block_n=block_n,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES[block_n],
    )
