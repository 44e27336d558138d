"""Attention over the pages of a page table, for the few query rows of a verification step.

    entries visible to query token i of the q_len tokens of request r:  j < kept[r, h] - (q_len - 1 - i)
    logits[t, hq, j] = scale * <query[t, hq], K[page_table[r, h, j]]>,  h = hq // (Hq / H)
    out[t, hq] = sum_j softmax(logits)_j * V[page_table[r, h, j]]

Causal, aligned to the bottom right: the last q_len entries of a row of the table are the new tokens, in order. The
query rows of a request and the query heads of a KV head are packed into one tile, so a gathered key is read once for
all of them. Split-KV over the entries.

query            [T, Hq, D]     float32, float16 or bfloat16; D is 64 or 128; requests one after another
kv_pages         [P, 2D]        query's dtype; row stride of 2D or more, last stride 1; K = [:, :D], V = [:, D:]
page_table       [R, H, width]  int32; entries past kept are undefined and never followed
kept             [R, H]         int32; 0 = this (request, head) is left to another executor
query_start_loc  [R + 1]        int32; q_len may be 0
scale            float          multiplies query . key
out              [T, Hq, D]     query's dtype; rows of a (request, head) with kept = 0 are left untouched. A token that
                                sees no entry, which no valid table has, gets zeros
max_query_len    int            bound of q_len; about 16 at most is meant, more is right but slow
lse              [T, Hq]        float32, natural logarithm, or None; -inf for a token that sees no entry
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import contracts
from .split_kv import combine_splits, log_norm, num_splits, softmax_step, split_range

# Gathered tokens per step: 32 KiB of 16-bit K and V at head size 128, double-buffered.
BLOCK_N = 64
# Query rows per tile: beyond this the accumulator spills, and further rows get tiles of their own.
MAX_BLOCK_M = 64
NUM_WARPS = 4


@triton.jit
def _sparse_kernel(
    query, kv_pages, page_table, kept, query_start_loc, part_acc, part_lse, scale,
    stride_qt, stride_qh, stride_page, stride_tr, stride_th, stride_kr, stride_kh, num_heads,
    GROUP: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) // TILES
    tile = tl.program_id(1) % TILES
    split = tl.program_id(2)
    begin = tl.load(query_start_loc + r)
    q_len = tl.load(query_start_loc + r + 1) - begin
    count = tl.load(kept + r * stride_kr + head * stride_kh)
    if (count <= 0) | (tile * BLOCK_M >= q_len * GROUP):
        return
    lo, hi = split_range(count, split, SPLITS, BLOCK)

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    i = row // GROUP
    live = i < q_len
    token = (begin + i).to(tl.int64)
    q_head = head * GROUP + row % GROUP
    q = tl.load(
        query + token[:, None] * stride_qt + q_head[:, None] * stride_qh + d[None, :], mask=live[:, None], other=0.0
    )
    visible = count - (q_len - 1 - i)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for start in range(lo, hi, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = j < hi
        page = tl.load(page_table + r * stride_tr + head * stride_th + j, mask=inside, other=0).to(tl.int64)
        entry = kv_pages + page * stride_page
        k = tl.load(entry[None, :] + d[:, None], mask=inside[None, :], other=0.0)
        logits = tl.dot(q, k, input_precision="ieee") * scale
        logits = tl.where(inside[None, :] & (j[None, :] < visible[:, None]), logits, float("-inf"))
        weights, rescale, top, norm = softmax_step(logits, top, norm)
        v = tl.load(entry[:, None] + (D + d)[None, :], mask=inside[:, None], other=0.0)
        acc = acc * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")

    part = (token * num_heads * GROUP + q_head) * SPLITS + split
    tl.store(part_lse + part, log_norm(top, norm), mask=live)
    acc = acc / tl.where(norm > 0.0, norm, 1.0)[:, None]
    tl.store(part_acc + part[:, None] * D + d[None, :], acc, mask=live[:, None])


@triton.jit
def _combine_kernel(
    part_acc, part_lse, kept, query_start_loc, out, lse,
    stride_kr, stride_kh, stride_ot, stride_oh, stride_lt, num_query_heads,
    GROUP: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1)
    h = tl.program_id(2)
    begin = tl.load(query_start_loc + r)
    q_len = tl.load(query_start_loc + r + 1) - begin
    if (i >= q_len) | (tl.load(kept + r * stride_kr + (h // GROUP) * stride_kh) <= 0):
        return
    token = (begin + i).to(tl.int64)
    part = (token * num_query_heads + h) * SPLITS
    result, total = combine_splits(part_acc + part * D, part_lse + part, D, 1, SPLITS, D, True)
    tl.store(out + token * stride_ot + h * stride_oh + tl.arange(0, D), result.to(out.dtype.element_ty))
    if HAS_LSE:
        tl.store(lse + token * stride_lt + h, total)


def sparse_attention(
    query: torch.Tensor, kv_pages: torch.Tensor, page_table: torch.Tensor, kept: torch.Tensor,
    query_start_loc: torch.Tensor, scale: float, out: torch.Tensor, max_query_len: int,
    lse: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Launch on the current stream, without waiting for the device; arguments as in the module's text. The scratch
    for the parts comes from torch's allocator, which a CUDA graph capture serves from the graph's own pool."""
    contracts.sparse_attention(query, kv_pages, page_table, kept, query_start_loc, out, max_query_len, lse)
    tokens, query_heads, size = query.shape
    contracts.head_size(size)
    rows, heads, width = page_table.shape
    if rows == 0 or tokens == 0:
        return
    group = query_heads // heads
    block_m = min(max(16, triton.next_power_of_2(max_query_len * group)), MAX_BLOCK_M)
    tiles = triton.cdiv(max_query_len * group, block_m)
    splits = num_splits(rows * heads * tiles, width, BLOCK_N, query.device)
    part_lse = torch.empty(tokens, query_heads, splits, dtype=torch.float32, device=query.device)
    part_acc = part_lse.new_empty(tokens, query_heads, splits, size)
    _sparse_kernel[(rows, heads * tiles, splits)](
        query, kv_pages, page_table, kept, query_start_loc, part_acc, part_lse, scale,
        *query.stride()[:2], kv_pages.stride(0), *page_table.stride()[:2], *kept.stride(), heads,
        GROUP=group, D=size, SPLITS=splits, TILES=tiles, BLOCK_M=block_m, BLOCK=BLOCK_N, num_warps=NUM_WARPS,
    )  # fmt: skip
    _combine_kernel[(rows, max_query_len, query_heads)](
        part_acc, part_lse, kept, query_start_loc, out, part_lse if lse is None else lse,
        *kept.stride(), *out.stride()[:2], 0 if lse is None else lse.stride(0), query_heads,
        GROUP=group, D=size, SPLITS=splits, HAS_LSE=lse is not None, num_warps=NUM_WARPS,
    )  # fmt: skip
