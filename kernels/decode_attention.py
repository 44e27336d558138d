"""Decode attention that hands out its scores.

    logits[r, h, p] = scale * <query[r, h], key[r, p, h // (Hq / H)]>        p < seq_lens[r]
    out[r, h] = sum_p softmax(logits[r, h])_p * value[r, p, h // (Hq / H)]
    lse[r, h] = log sum_p exp(logits[r, h, p])

One query row per request. The logits are stored on the way, so a draft layer's attention over the whole context costs
one pass over its keys; ``exp(logit - lse)`` is the attention probability. Split-KV over the context.

query        [R, Hq, D]    float32, float16 or bfloat16; D is 64 or 128
kv_cache     [B, H, N, 2D] query's dtype, any strides but the last (1): key = [..., :D], value = [..., D:]
block_table  [R, nb]       int32; entries past ceil(seq_len / N) are stale and never followed
seq_lens     [R]           int32, at most nb * N and at most the width of ``scores``; 0 = padded row
scale        float         multiplies query . key
out          [R, Hq, D]    query's dtype, or None when only scores are wanted; zeros for a padded row
scores       [R, Hq, L]    float32 or bfloat16, or None; positions from seq_len on are left untouched
lse          [R, Hq]       float32, natural logarithm; required with scores; -inf for a padded row

Products of 16-bit inputs are summed in fp32; the softmax weights are rounded to the cache's dtype for the second
product, as in FlashAttention. Scores may be bfloat16 to halve their traffic; lse is that of the unrounded logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import contracts
from .split_kv import combine_splits, log_norm, num_splits, softmax_step, split_range

# Keys per step. 64 keys of 2 * 128 16-bit numbers are 32 KiB: two stages fit in shared memory beside a second program.
BLOCK_N = 64
NUM_WARPS = 4


@triton.jit
def _decode_kernel(
    query, kv_cache, block_table, seq_lens, scores, part_acc, part_lse, scale,
    stride_qr, stride_qh, stride_b, stride_h, stride_n, stride_tr, stride_sr, stride_sh,
    block_size, num_heads,
    GROUP: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
    HAS_OUT: tl.constexpr, HAS_SCORES: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    lo, hi = split_range(tl.load(seq_lens + r), split, SPLITS, BLOCK)

    # All query heads of a KV head share its keys; the row dimension is padded to what tl.dot takes.
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    live = m < GROUP
    q_head = head * GROUP + m
    q = tl.load(query + r * stride_qr + q_head[:, None] * stride_qh + d[None, :], mask=live[:, None], other=0.0)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for start in range(lo, hi, BLOCK):
        p = start + tl.arange(0, BLOCK)
        inside = p < hi
        block = tl.load(block_table + r * stride_tr + p // block_size, mask=inside, other=0).to(tl.int64)
        token = kv_cache + block * stride_b + head.to(tl.int64) * stride_h + (p % block_size).to(tl.int64) * stride_n
        k = tl.load(token[None, :] + d[:, None], mask=inside[None, :], other=0.0)
        logits = tl.dot(q, k, input_precision="ieee") * scale
        if HAS_SCORES:
            tl.store(
                scores + r * stride_sr + q_head.to(tl.int64)[:, None] * stride_sh + p[None, :],
                logits.to(scores.dtype.element_ty),
                mask=live[:, None] & inside[None, :],
            )
        logits = tl.where(inside[None, :], logits, float("-inf"))
        weights, rescale, top, norm = softmax_step(logits, top, norm)
        if HAS_OUT:
            v = tl.load(token[:, None] + (D + d)[None, :], mask=inside[:, None], other=0.0)
            acc = acc * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")

    part = (r * num_heads * GROUP + q_head) * SPLITS + split
    tl.store(part_lse + part, log_norm(top, norm), mask=live)
    if HAS_OUT:
        acc = acc / tl.where(norm > 0.0, norm, 1.0)[:, None]
        tl.store(part_acc + part[:, None] * D + d[None, :], acc, mask=live[:, None])


@triton.jit
def _combine_kernel(
    part_acc, part_lse, out, lse, stride_or, stride_oh, stride_lr, num_query_heads,
    D: tl.constexpr, SPLITS: tl.constexpr, HAS_OUT: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    part = (r * num_query_heads + h) * SPLITS
    result, total = combine_splits(part_acc + part * D, part_lse + part, D, 1, SPLITS, D, HAS_OUT)
    if HAS_OUT:
        tl.store(out + r * stride_or + h * stride_oh + tl.arange(0, D), result.to(out.dtype.element_ty))
    if HAS_LSE:
        tl.store(lse + r * stride_lr + h, total)


def decode_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor | None,
    scores: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> None:
    """Launch on the current stream, without waiting for the device; arguments as in the module's text. The scratch
    for the parts comes from torch's allocator, which a CUDA graph capture serves from the graph's own pool."""
    contracts.decode_attention(query, kv_cache, block_table, seq_lens, out, scores, lse)
    rows, query_heads, size = query.shape
    contracts.head_size(size)
    if rows == 0:
        return
    heads, block_size = kv_cache.shape[1:3]
    group = query_heads // heads
    longest = block_table.shape[1] * block_size
    splits = num_splits(rows * heads, longest, BLOCK_N, query.device)
    part_lse = torch.empty(rows, query_heads, splits, dtype=torch.float32, device=query.device)
    # Unused pointers still have to be pointers.
    part_acc = part_lse if out is None else part_lse.new_empty(rows, query_heads, splits, size)
    _decode_kernel[(rows, heads, splits)](
        query, kv_cache, block_table, seq_lens, part_lse if scores is None else scores, part_acc, part_lse, scale,
        *query.stride()[:2], *kv_cache.stride()[:3], block_table.stride(0),
        *((0, 0) if scores is None else scores.stride()[:2]), block_size, heads,
        GROUP=group, D=size, SPLITS=splits, BLOCK_M=max(16, triton.next_power_of_2(group)), BLOCK=BLOCK_N,
        HAS_OUT=out is not None, HAS_SCORES=scores is not None, num_warps=NUM_WARPS,
    )  # fmt: skip
    _combine_kernel[(rows, query_heads)](
        part_acc, part_lse, part_lse if out is None else out, part_lse if lse is None else lse,
        *((0, 0) if out is None else out.stride()[:2]), 0 if lse is None else lse.stride(0), query_heads,
        D=size, SPLITS=splits, HAS_OUT=out is not None, HAS_LSE=lse is not None, num_warps=NUM_WARPS,
    )  # fmt: skip
