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
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import padding
from ..contracts import checked, head_size
from . import contracts
from .soft_cap import soft_cap_logits
from .split_kv import LaunchConfig, log_norm, num_splits, strides

# The accumulator of a taller tile would spill. Further rows get tiles of their own, which read the keys again.
MAX_BLOCK_M = 64

# For 16-bit inputs, by padded head size and whether a request has more than 32 query rows. Two warps cover 32 rows with
# 16 each; more warps would repeat work. 64 rows fit four warps, and wgmma on Hopper. A step of 64 entries at head size
# 128 is 32 KiB, double-buffered with 3 or 4 stages (three buffers with 5 or 6): five programs of two warps fit into
# Hopper's 228 KiB, two into Ada's 100. A step of fewer entries than threads loads its page ids more than once. Swept
# for 24 rows of head size 128 on an H200, 2026-11-26 (a tenth of 16x32k, 4x32k and 64x4k, shared and per head): no
# other configuration is faster by more than the noise of 1%. For 16x32k, 4 warps take 6 to 7% more time, 8 warps 36%;
# steps of 32 or 128 entries 8 and 12%; waves of 2 or 3, 23 to 27%; waves of 8, 9% (45% for 64x4k); tiles of 64 rows
# twice the time. 2 or 4 stages, and waves of 6, are equal within 2%.
CONFIGS = {
    (64, False): LaunchConfig(block_n=64, num_warps=2, num_stages=3, waves=4),
    (64, True): LaunchConfig(block_n=128, num_warps=4, num_stages=3, waves=4),
    (128, False): LaunchConfig(block_n=64, num_warps=2, num_stages=3, waves=4),
    (128, True): LaunchConfig(block_n=64, num_warps=4, num_stages=3, waves=4),
    # Not measured: as many bytes in a step, and as many registers for the accumulator.
    (256, False): LaunchConfig(block_n=32, num_warps=4, num_stages=3, waves=2),
    (256, True): LaunchConfig(block_n=32, num_warps=8, num_stages=3, waves=2),
}
# For tests only: it runs without tensor cores and only has to fit.
FP32_CONFIG = LaunchConfig(block_n=32, num_warps=8, num_stages=2, waves=2)


@triton.jit
def _sparse_kernel(
    query, kv_cache, page_table, kept, query_start_loc, out, lse, part_acc, part_lse, log2_scale, soft_cap,
    stride_qt, stride_qh, stride_tr, stride_th, stride_kr, stride_kh, stride_ot, stride_oh, stride_lt,
    head_rows, num_query_heads,
    GROUP: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
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
    # Parts are whole blocks, so that only the last one has a ragged end.
    per_split = tl.cdiv(tl.cdiv(count, SPLITS), BLOCK) * BLOCK
    lo = tl.minimum(split * per_split, count)
    hi = tl.minimum(lo + per_split, count)

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, padding.padded(D))
    inside = d < D
    i = row // GROUP
    live = i < q_len
    token = (begin + i).to(tl.int64)
    q_head = head * GROUP + row % GROUP
    live_columns = padding.both(live[:, None], inside[None, :], D)
    where = query + token[:, None] * stride_qt + q_head[:, None] * stride_qh + d[None, :]
    q = tl.load(where, mask=live_columns, other=0.0)
    visible = tl.minimum(count - (q_len - 1 - i), hi)
    page_table += r * stride_tr + head.to(tl.int64) * stride_th
    first_page = head * head_rows

    # The softmax uses powers of two, because the hardware computes these.
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, padding.padded(D)], tl.float32)
    for start in range(lo, hi, BLOCK):
        j = start + tl.arange(0, BLOCK)
        # Past the end, the last entry is read again, and `visible` drops it: loads without masks pipeline best.
        page = tl.load(page_table + tl.minimum(j, hi - 1)) + first_page
        entry = kv_cache + page.to(tl.int64) * (2 * D)
        k = padding.load(entry[None, :] + d[:, None], inside[:, None], D).to(q.dtype)
        logits = tl.dot(q, k, input_precision="ieee") * log2_scale
        if soft_cap is not None:
            logits = soft_cap_logits(logits * 0.6931471805599453, soft_cap) * 1.4426950408889634
        logits = tl.where(j[None, :] < visible[:, None], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        # The maximum of a row is -inf if all its logits so far are masked, and -inf - -inf would be nan.
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(logits - safe[:, None])
        rescale = tl.exp2(top - safe)
        norm = norm * rescale + tl.sum(weights, 1)
        top = new_top
        v = padding.load(entry[:, None] + (D + d)[None, :], inside[None, :], D).to(q.dtype)
        acc = acc * rescale[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")

    total = log_norm(top * 0.6931471805599453, norm)
    acc = acc / tl.where(norm > 0.0, norm, 1.0)[:, None]
    if SPLITS == 1:
        here = out + token[:, None] * stride_ot + q_head[:, None] * stride_oh + d[None, :]
        tl.store(here, acc.to(out.dtype.element_ty), mask=live_columns)
        if lse is not None:
            tl.store(lse + token * stride_lt + q_head, total, mask=live)
    else:
        part = (token * num_query_heads + q_head) * SPLITS + split
        tl.store(part_lse + part, total, mask=live)
        if lo < hi:  # parts without entries have lse = -inf and are never read
            tl.store(part_acc + part[:, None] * D + d[None, :], acc, mask=live_columns)


@triton.jit
def _combine_kernel(
    part_acc, part_lse, kept, query_start_loc, out, lse,
    stride_kr, stride_kh, stride_ot, stride_oh, stride_lt, num_query_heads,
    GROUP: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
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
    s = tl.arange(0, SPLITS)
    d = tl.arange(0, padding.padded(D))
    inside = d < D
    part_log = tl.load(part_lse + part + s)
    top = tl.max(part_log, 0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(part_log - safe)
    norm = tl.sum(weight, 0)
    some = part_log > float("-inf")
    mask = padding.both(some[:, None], inside[None, :], D)
    acc = tl.load(part_acc + part * D + s[:, None] * D + d[None, :], mask=mask, other=0.0)
    result = tl.sum(acc * weight[:, None], 0) / tl.where(norm > 0.0, norm, 1.0)
    padding.store(out + token * stride_ot + h * stride_oh + d, result.to(out.dtype.element_ty), inside, D)
    if lse is not None:
        tl.store(lse + token * stride_lt + h, log_norm(safe, norm))


@checked(contracts.sparse_attention)
def sparse_attention(
    query, kv_cache, page_table, kept, query_start_loc, scale, out, max_query_len, lse=None, soft_cap=None,
    config: LaunchConfig | None = None,
) -> None:  # fmt: skip
    """Temporary memory for the parts comes from torch's allocator, under CUDA graph capture from the graph's own pool.
    config: None chooses one by dtype and shapes."""
    tokens, query_heads, size = query.shape
    head_size(size)
    rows, groups, width = page_table.shape
    if rows == 0 or tokens == 0 or width == 0:
        return
    heads = kv_cache.shape[1]
    group = query_heads // heads
    exact = query.dtype == torch.float32
    config = config or (FP32_CONFIG if exact else CONFIGS[padding.padded(size), max_query_len * group > 32])
    shared = groups < heads
    head_rows = kv_cache.stride(1) // (2 * size) if shared else 0
    table_stride, kept_stride = (0, 0) if shared else (page_table.stride(1), kept.stride(1))
    block_m = max(16, min(triton.next_power_of_2(max_query_len * group), MAX_BLOCK_M))
    tiles = triton.cdiv(max_query_len * group, block_m)
    splits = num_splits(rows * heads * tiles, width, config, query.device)
    part_lse = part_acc = None
    if splits > 1:
        part_lse = torch.empty(tokens, query_heads, splits, dtype=torch.float32, device=query.device)
        part_acc = part_lse.new_empty(tokens, query_heads, splits, size)
    _sparse_kernel[(heads * tiles, rows, splits)](
        query, kv_cache, page_table, kept, query_start_loc, out, lse, part_acc, part_lse,
        scale * 1.4426950408889634, soft_cap, *query.stride()[:2], page_table.stride(0), table_stride,
        kept.stride(0), kept_stride, *out.stride()[:2], *strides(lse, 1), head_rows, query_heads,
        GROUP=group, D=size, SPLITS=splits, TILES=tiles, BLOCK_M=block_m, BLOCK=config.block_n,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(query_heads, rows, max_query_len)](
            part_acc, part_lse, kept, query_start_loc, out, lse,
            kept.stride(0), kept_stride, *out.stride()[:2], *strides(lse, 1), query_heads,
            GROUP=group, D=size, SPLITS=splits, num_warps=1 if splits <= 8 else 4,
        )  # fmt: skip
