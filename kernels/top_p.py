"""Sorting-free top-p selection of context tokens, in integers.

Top-p by bisection on the threshold instead of by sorting: Shah, arXiv 2510.27641, s.3. Here in fixed point, so that
the result is exact and does not depend on the order of summation:

    q_p = int(mass_p * 2^30)                       truncated; the product is exact
    T   = sum of q_p over [0, len)
    M   = (T * P + 65535) >> 16                    P = round(top_p * 65536), in 64 bits

*Forced* tokens are p < sink and p >= len - recent. *Wanted* are the forced tokens and the shortest prefix of the
others, in *order* - by q descending, at equal q by position descending (most recent first) - that brings the selected
mass to M or more; top_p >= 1 wants every token. The number selected is then clamped to [lower, upper], by going on or
stopping early in the same order:

    upper = min(max_tokens, (len * F + 65535) >> 16), at least the forced, at most len;  F = round(max_fraction * 65536)
    lower = min(min_tokens, upper)

mass    [X, L]  float32, 0 or more; the sum of a row is at most 1, give or take rounding (sums are kept in int32, which
                holds up to 2)
lens    [X]     int32, at most L; 0 = padded row: no bit set, count 0
bits    [X, W]  int32, W = ceil(L / 32): token p is bit p % 32 of word p // 32; every word of a row is written, and is
                zero past len
counts  [X]     int32, number of bits set in the row
max_tokens      -1 = no limit
union           OR the selection into ``bits``; ``counts`` is then that of the union
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import contracts

# Candidate thresholds tried per pass over the row: eight find three bits of the threshold, so eleven passes find all
# 31. A pass costs its trips to L2, not its arithmetic.
RADIX: tl.constexpr = tl.constexpr(8)
PASSES: tl.constexpr = tl.constexpr(11)
# RADIX * BLOCK running sums are 64 registers a thread at 8 warps.
BLOCK = 2048
NUM_WARPS = 8
ALL = 1 << 17  # passed for P when every token is wanted


@triton.jit
def _quanta(mass, p, length, forced_head, forced_tail):
    """Fixed-point mass at positions p, 0 outside the row; and which of them are in the row but not forced."""
    inside = p < length
    q = (tl.load(mass + p, mask=inside, other=0.0) * 1073741824.0).to(tl.int32)
    return q, inside & (p >= forced_head) & (p < forced_tail)


@triton.jit
def _threshold(mass, length, forced_head, forced_tail, need, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """The largest t for which the free tokens with q >= t weigh ``need`` or more; those with q >= 0 have to. A token
    weighs its q, or 1 if not WEIGHTED. Also (weight, number) of the tokens with q > t, and the number with q == t."""
    digit = tl.arange(0, RADIX)
    t = tl.full([], 0, tl.int32)
    for i in range(PASSES):
        # Shifts 28, 25, ... 1, 0. The last pass overlaps by two bits, whose candidates are already known to fail.
        shift = tl.maximum(28 - 3 * i, 0)
        candidate = t + (digit << shift)
        sums = tl.zeros([RADIX, BLOCK], tl.int32)
        for start in range(0, length, BLOCK):
            q, free = _quanta(mass, start + tl.arange(0, BLOCK), length, forced_head, forced_tail)
            reached = free[None, :] & (q[None, :] >= candidate[:, None])
            if WEIGHTED:
                sums += tl.where(reached, q[None, :], 0)
            else:
                sums += reached.to(tl.int32)
        enough = (tl.sum(sums, 1) >= need).to(tl.int32)
        # Digit 0 always is enough, and enough digits come before the others.
        t += (tl.sum(enough, 0) - 1) << shift
    weight = tl.zeros([BLOCK], tl.int32)
    above = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    for start in range(0, length, BLOCK):
        q, free = _quanta(mass, start + tl.arange(0, BLOCK), length, forced_head, forced_tail)
        weight += tl.where(free & (q > t), q, 0)
        above += (free & (q > t)).to(tl.int32)
        equal += (free & (q == t)).to(tl.int32)
    return t, tl.sum(weight, 0), tl.sum(above, 0), tl.sum(equal, 0)


@triton.jit
def _top_p_kernel(
    mass, lens, bits, counts, stride_m, stride_b, words, p_fixed, f_fixed, min_tokens, max_tokens, sink, recent,
    UNION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    mass += row * stride_m
    bits += row * stride_b
    length = tl.load(lens + row)
    forced_head = tl.minimum(sink, length)
    forced_tail = tl.maximum(length - recent, forced_head)
    forced = forced_head + length - forced_tail

    whole = tl.zeros([BLOCK], tl.int32)
    part = tl.zeros([BLOCK], tl.int32)
    for start in range(0, length, BLOCK):
        q, free = _quanta(mass, start + tl.arange(0, BLOCK), length, forced_head, forced_tail)
        whole += q
        part += tl.where(free, q, 0)
    total = tl.sum(whole, 0)
    target = ((total.to(tl.int64) * p_fixed + 65535) >> 16).to(tl.int32)
    need = target - (total - tl.sum(part, 0))  # mass that the free tokens have to bring

    # `threshold` and the number of tokens above and at it describe the last search made; `free_count` tokens are to be
    # taken off the top of the order. A threshold above every q takes nothing.
    threshold = tl.full([], 0x7FFFFFFF, tl.int32)
    above = tl.full([], 0, tl.int32)
    equal = tl.full([], 0, tl.int32)
    free_count = tl.full([], 0, tl.int32)
    if p_fixed > 65536:
        free_count = length - forced
    elif need > 0:
        threshold, weight, above, equal = _threshold(mass, length, forced_head, forced_tail, need, True, BLOCK)
        # The threshold is positive: tokens of mass 0 never help to reach it.
        free_count = above + (need - weight + threshold - 1) // tl.maximum(threshold, 1)

    upper = ((length.to(tl.int64) * f_fixed + 65535) >> 16).to(tl.int32)
    if max_tokens >= 0:
        upper = tl.minimum(upper, max_tokens)
    upper = tl.minimum(tl.maximum(upper, forced), length)
    lower = tl.minimum(min_tokens, upper)
    selected = tl.maximum(tl.minimum(forced + free_count, upper), lower)
    free_count = selected - forced
    if free_count >= length - forced:
        threshold = tl.full([], -1, tl.int32)  # everything lies above it
        above = free_count
        equal = tl.full([], 0, tl.int32)
    elif free_count <= 0:
        threshold = tl.full([], 0x7FFFFFFF, tl.int32)
        above = tl.full([], 0, tl.int32)
        equal = tl.full([], 0, tl.int32)
    elif (free_count < above) | (free_count > above + equal):
        threshold, weight, above, equal = _threshold(mass, length, forced_head, forced_tail, free_count, False, BLOCK)

    # Of the tokens at the threshold the last ones are taken: skip as many as there are too many.
    skip = equal - (free_count - above)
    seen = tl.full([], 0, tl.int32)
    union_bits = tl.zeros([BLOCK // 32], tl.int32)
    lane = tl.arange(0, 32)
    for start in range(0, words * 32, BLOCK):
        p = start + tl.arange(0, BLOCK)
        q, free = _quanta(mass, p, length, forced_head, forced_tail)
        tied = free & (q == threshold)
        rank = seen + tl.cumsum(tied.to(tl.int32), 0) - 1
        seen += tl.sum(tied.to(tl.int32), 0)
        keep = ((p < length) & (free == 0)) | (free & (q > threshold)) | (tied & (rank >= skip))
        word = tl.sum(tl.reshape(keep.to(tl.int32), [BLOCK // 32, 32]) << lane[None, :], 1)
        w = start // 32 + tl.arange(0, BLOCK // 32)
        if UNION:
            word |= tl.load(bits + w, mask=w < words, other=0)
            union_bits += tl.sum((word[:, None] >> lane[None, :]) & 1, 1)
        tl.store(bits + w, word, mask=w < words)
    if UNION:
        selected = tl.sum(union_bits, 0)
    tl.store(counts + row, selected)


def select_top_p(
    mass: torch.Tensor, lens: torch.Tensor, bits: torch.Tensor, counts: torch.Tensor, top_p: float, min_tokens: int,
    max_tokens: int, max_fraction: float, sink: int, recent: int, union: bool = False,
) -> None:  # fmt: skip
    """Launch on the current stream, without waiting for the device; arguments as in the module's text."""
    contracts.select_top_p(mass, lens, bits, counts, top_p, min_tokens, max_tokens, max_fraction, sink, recent)
    if mass.shape[0] == 0:
        return
    p_fixed = ALL if top_p >= 1 else round(top_p * 65536)
    _top_p_kernel[(mass.shape[0],)](
        mass, lens, bits, counts, mass.stride(0), bits.stride(0), bits.shape[1], p_fixed, round(max_fraction * 65536),
        min_tokens, max_tokens, sink, recent, UNION=union, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
