"""Attention over the pages of a page table, for the few query rows of a verification step.

    entries visible to query token i of the q_len tokens of request r:  j < kept[r, g] - (q_len - 1 - i)
    logits[t, hq, j] = scale * <query[t, hq], K[page(r, h, j)]>,  h = hq // (Hq / H)
    out[t, hq] = sum_j softmax(logits)_j * V[page(r, h, j)]
    page(r, h, j) = page_table[r, h, j]                       G = H: every head has a table of its own
                  = page_table[r, 0, j] + h * head_stride     G = 1: all heads share one, with the pages of head 0

A page is the key and value of one token and one head: a row of 2D elements. Page ids count rows from the start of the
cache. Attention is causal, aligned to the bottom right: the last q_len entries of a table row are the new tokens, in
order. The query rows of a request and the query heads of a KV head are packed into one tile, so each key is read once
for all of them. Split-KV over the entries.

query            [T, Hq, D]     float32, float16 or bfloat16; D is 64 or 128; requests one after another
kv_cache         [B, H, N, 2D]  query's dtype; last stride 1, the others multiples of 2D; K = [..., :D], V = [..., D:]
page_table       [R, G, width]  int32, G is 1 or H; entries past kept are undefined and never followed
kept             [R, G]         int32; 0 or less = this (request, group) is left to another executor
query_start_loc  [R + 1]        int32; q_len may be 0
scale            float          multiplies query . key
out              [T, Hq, D]     query's dtype; rows of a (request, head) with kept <= 0 are left untouched. A token that
                                sees no entry, which no valid table has, gets zeros
max_query_len    int            bound of q_len; meant for up to about 16; larger is correct but slow
lse              [T, Hq]        float32, natural logarithm, or None; -inf for a token that sees no entry

The Triton version also takes ``config``, a ``LaunchConfig``; None picks one by dtype and shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..contracts import head_size
from . import contracts
from .split_kv import combine_splits, log_norm, num_splits, split_range


@dataclass(frozen=True)
class LaunchConfig:
    """Parameters to tune. They change results only by the order of summation."""

    block_m: int  # least number of query rows in a tile, padded with rows that are dropped; tl.dot needs at least 16
    block_n: int  # entries gathered per step
    num_warps: int
    num_stages: int  # depth of the pipeline; page ids take half of it, because keys can only be loaded after them
    waves: int  # programs wanted per multiprocessor: rows differ in length, and the longest one sets the pace


# The accumulator of a taller tile would spill. Further rows get tiles of their own, which read the keys again.
MAX_BLOCK_M = 64

# For 16-bit inputs, by head size and whether a request has more than 32 query rows. Two warps cover 32 rows with 16
# each; more warps would repeat work. 64 rows fit four warps, and wgmma on Hopper. A step of 64 entries at head size 128
# is 32 KiB, double-buffered with 3 or 4 stages (three buffers with 5 or 6): five programs of two warps fit into
# Hopper's 228 KiB, two into Ada's 100. A step of fewer entries than threads loads its page ids more than once.
# Swept for 24 rows of head size 128 on an H200, 2026-11-26 (a tenth of 16x32k, 4x32k and 64x4k, shared and per head):
# no other configuration is faster by more than the noise of 1%. For 16x32k, 4 warps take 6 to 7% more time, 8 warps
# 36%; steps of 32 or 128 entries 8 and 12%; waves of 2 or 3, 23 to 27%; waves of 8, 9% (45% for 64x4k); tiles of 64
# rows twice the time. 2 or 4 stages, and waves of 6, are equal within 2%.
CONFIGS = {
    (64, False): LaunchConfig(block_m=16, block_n=64, num_warps=2, num_stages=3, waves=4),
    (64, True): LaunchConfig(block_m=64, block_n=128, num_warps=4, num_stages=3, waves=4),
    (128, False): LaunchConfig(block_m=16, block_n=64, num_warps=2, num_stages=3, waves=4),
    (128, True): LaunchConfig(block_m=64, block_n=64, num_warps=4, num_stages=3, waves=4),
}
# For tests only: it runs without tensor cores and only has to fit.
FP32_CONFIG = LaunchConfig(block_m=16, block_n=32, num_warps=8, num_stages=2, waves=2)


def default_config(query: torch.Tensor, query_rows: int) -> LaunchConfig:
    """The configuration if ``sparse_attention`` is given none; query_rows: query tokens of a request x Hq / H."""
    return FP32_CONFIG if query.element_size() == 4 else CONFIGS[query.shape[2], query_rows > 32]


@triton.jit
def _sparse_kernel(
    query, kv_cache, page_table, kept, query_start_loc, out, lse, part_acc, part_lse, log2_scale,
    stride_qt, stride_qh, stride_tr, stride_th, stride_kr, stride_kh, stride_ot, stride_oh, stride_lt,
    head_rows, num_query_heads,
    GROUP: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    # Heads vary fastest: in the usual layout the heads of a token are neighbours in memory.
    head = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    r = tl.program_id(1).to(tl.int64)
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
    visible = tl.minimum(count - (q_len - 1 - i), hi)
    page_table += r * stride_tr + head.to(tl.int64) * stride_th
    first_page = head * head_rows

    # The softmax uses powers of two, because the hardware computes these.
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for start in range(lo, hi, BLOCK):
        j = start + tl.arange(0, BLOCK)
        # Past the end, the last entry is read again, and `visible` drops it: loads without masks pipeline best.
        page = tl.load(page_table + tl.minimum(j, hi - 1)) + first_page
        entry = kv_cache + page.to(tl.int64) * (2 * D)
        k = tl.load(entry[None, :] + d[:, None])
        logits = tl.dot(q, k, input_precision="ieee") * log2_scale
        logits = tl.where(j[None, :] < visible[:, None], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        # The maximum of a row is -inf if all its logits so far are masked, and -inf - -inf would be nan.
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(logits - safe[:, None])
        rescale = tl.exp2(top - safe)
        norm = norm * rescale + tl.sum(weights, 1)
        top = new_top
        v = tl.load(entry[:, None] + (D + d)[None, :])
        acc = acc * rescale[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")

    total = log_norm(top * 0.6931471805599453, norm)
    acc = acc / tl.where(norm > 0.0, norm, 1.0)[:, None]
    if SPLITS == 1:
        here = out + token[:, None] * stride_ot + q_head[:, None] * stride_oh + d[None, :]
        tl.store(here, acc.to(out.dtype.element_ty), mask=live[:, None])
        if HAS_LSE:
            tl.store(lse + token * stride_lt + q_head, total, mask=live)
    else:
        part = (token * num_query_heads + q_head) * SPLITS + split
        tl.store(part_lse + part, total, mask=live)
        if lo < hi:  # parts without entries have lse = -inf and are never read
            tl.store(part_acc + part[:, None] * D + d[None, :], acc, mask=live[:, None])


@triton.jit
def _combine_kernel(
    part_acc, part_lse, kept, query_start_loc, out, lse,
    stride_kr, stride_kh, stride_ot, stride_oh, stride_lt, num_query_heads,
    GROUP: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0)
    r = tl.program_id(1).to(tl.int64)
    i = tl.program_id(2)
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
    query: torch.Tensor, kv_cache: torch.Tensor, page_table: torch.Tensor, kept: torch.Tensor,
    query_start_loc: torch.Tensor, scale: float, out: torch.Tensor, max_query_len: int,
    lse: torch.Tensor | None = None, config: LaunchConfig | None = None,
) -> None:  # fmt: skip
    """Launch on the current stream, without waiting for the device; arguments as in the module's text. Temporary
    memory for the parts comes from torch's allocator, under CUDA graph capture from the graph's own pool."""
    head_rows = contracts.sparse_attention(query, kv_cache, page_table, kept, query_start_loc, out, max_query_len, lse)
    tokens, query_heads, size = query.shape
    head_size(size)
    rows, groups, width = page_table.shape
    if rows == 0 or tokens == 0 or width == 0:
        return
    heads = kv_cache.shape[1]
    group = query_heads // heads
    config = config or default_config(query, max_query_len * group)
    if groups == 1:
        table_stride, kept_stride = 0, 0
    else:
        head_rows, table_stride, kept_stride = 0, page_table.stride(1), kept.stride(1)
    block_m = max(config.block_m, min(triton.next_power_of_2(max_query_len * group), MAX_BLOCK_M))
    tiles = triton.cdiv(max_query_len * group, block_m)
    splits = num_splits(rows * heads * tiles, width, config.block_n, query.device, config.waves)
    # Without parts the pointers are unused, but must still be pointers.
    part_lse = part_acc = out
    if splits > 1:
        part_lse = torch.empty(tokens, query_heads, splits, dtype=torch.float32, device=query.device)
        part_acc = part_lse.new_empty(tokens, query_heads, splits, size)
    total, total_stride = (kept, 0) if lse is None else (lse, lse.stride(0))
    _sparse_kernel[(heads * tiles, rows, splits)](
        query, kv_cache, page_table, kept, query_start_loc, out, total, part_acc, part_lse,
        scale * 1.4426950408889634, *query.stride()[:2], page_table.stride(0), table_stride,
        kept.stride(0), kept_stride, *out.stride()[:2], total_stride, head_rows, query_heads,
        GROUP=group, D=size, SPLITS=splits, TILES=tiles, BLOCK_M=block_m, BLOCK=config.block_n,
        HAS_LSE=lse is not None, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(query_heads, rows, max_query_len)](
            part_acc, part_lse, kept, query_start_loc, out, total,
            kept.stride(0), kept_stride, *out.stride()[:2], total_stride, query_heads,
            GROUP=group, D=size, SPLITS=splits, HAS_LSE=lse is not None, num_warps=1 if splits <= 8 else 4,
        )  # fmt: skip
