"""Top-p selection of context tokens without sorting, in integers.

It finds the threshold by bisection instead of sorting (Shah, arXiv 2510.27641, s.3). Here it is in fixed point, so that
the result is exact and does not depend on the order of summation:

    q_p = int(mass_p * 2^30)                       truncated; the product is exact. NaN and negative masses count as
                                                   0, masses above 1 as 1: whatever they are, the selection is one
    T   = sum of q_p over [0, len)
    M   = (T * P + 65535) >> 16                    P = round(top_p * 65536), in 64 bits

*Forced* tokens are p < sink and p >= len - recent. The other tokens are *free*, in order of q descending, at equal q of
position descending (most recent first). The selection is the forced tokens and the shortest prefix of the free ones
that brings the selected mass to M or more; with top_p >= 1 it is every token. The number of selected tokens is then
clamped to [lower, upper], by taking more or fewer in the same order:

    share = (len * F + 65535) >> 16                F = round(max_fraction * 65536)
    upper = min(max_tokens, max(share, min_tokens)), at least the forced, at most len
    lower = min(min_tokens, upper)

With top_p >= 1 this is a fixed budget: a share of the row between a floor and a cap.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..contracts import checked
from . import contracts
from .bit_words import drop_lowest, low_bits, pack, popcount
from .threshold import NONE_TAKEN, find_in_memory, find_in_registers, quanta

# Chosen for an H200 by reasoning and from the compiler's output; not yet measured.
# Longest row that is held in registers: 32 tokens per thread at 32 warps, which leaves as many registers for the work.
RESIDENT = 32768
# Tokens of a resident row per thread, as long as that needs no more than 32 warps.
PER_THREAD = 8
# Tokens per step over a longer row: 8 per thread with one running sum per candidate, 4 with two; more would spill.
TILE = 8192
STAGES = 3  # steps whose loads are in flight
# Sums use predicated adds in PTX, which only NVIDIA's compiler supports, not the interpreter.
FUSED = torch.version.hip is None
PACK = 4  # tokens per predicated add: every thread must hold a multiple
MIN_WARPS = 4
ALL = 1 << 17  # passed as P to select every token


@triton.jit
def _limits(length, forced, f_fixed, min_tokens, max_tokens):
    """(fewest, most) free tokens that may be selected."""
    upper = tl.maximum(((length.to(tl.int64) * f_fixed + 65535) >> 16).to(tl.int32), min_tokens)
    if max_tokens >= 0:
        upper = tl.minimum(upper, max_tokens)
    upper = tl.minimum(tl.maximum(upper, forced), length)
    lower = tl.minimum(min_tokens, upper)
    return tl.maximum(lower - forced, 0), upper - forced


@triton.jit
def _missing(total, free, p_fixed):
    """Mass that the selected free tokens must have: the target minus the mass of forced tokens."""
    target = ((total.to(tl.int64) * p_fixed + 65535) >> 16).to(tl.int32)
    return target - (total - free)


@triton.jit
def _search_needed(need, lower, upper, free_count, WEIGHED: tl.constexpr):
    """(threshold, whether a search is needed). It is not needed if no free token, or every one, is selected."""
    if WEIGHED:
        nothing = (upper <= 0) | ((need <= 0) & (lower <= 0))
        everything = lower >= free_count
    else:
        nothing = upper <= 0
        everything = upper >= free_count
    return tl.where(nothing, NONE_TAKEN, 0), (nothing | everything) == 0


@triton.jit
def _write(q, start, length, threshold, skip, seen, bits, words, UNION: tl.constexpr, SIZE: tl.constexpr):
    """Writes the words of q [SIZE], which starts at position ``start``. Returns the number of tied tokens seen and of
    bits set. The first ``skip`` tied tokens of the row are left out; ``seen``: tied tokens before ``start``."""
    w = start // 32 + tl.arange(0, SIZE // 32)
    # Tied tokens are all selected here, or added below. Tokens that are not free have q = -1, the largest unsigned
    # number, so those inside the row are selected.
    cut = threshold + (skip > 0).to(tl.int32)
    word = pack(q.to(tl.uint32, bitcast=True) >= cut.to(tl.uint32, bitcast=True), SIZE) & low_bits(length - w * 32)
    if skip > 0:
        tied = pack(q == threshold, SIZE)
        number = popcount(tied)
        before = seen + tl.cumsum(number, 0) - number
        seen += tl.sum(number, 0)
        word |= drop_lowest(tied, skip - before)
    if UNION:
        word |= tl.load(bits + w, mask=w < words, other=0)
    tl.store(bits + w, word, mask=w < words)
    return seen, tl.sum(popcount(word), 0)


@triton.jit
def _write_rest(first, bits, words, UNION: tl.constexpr, SIZE: tl.constexpr):
    """Clears the words from ``first`` on, or keeps them for a union. Returns the number of bits set in them."""
    count = tl.full([], 0, tl.int32)
    for start in range(first, words, SIZE):
        w = start + tl.arange(0, SIZE)
        if UNION:
            count += tl.sum(popcount(tl.load(bits + w, mask=w < words, other=0)), 0)
        else:
            tl.store(bits + w, tl.zeros([SIZE], tl.int32), mask=w < words)
    return count


@triton.jit
def _resident_row(
    mass, length, head, tail, bits, words, p_fixed, lower, upper,
    WEIGHED: tl.constexpr, COUNTED: tl.constexpr, UNION: tl.constexpr, FUSED: tl.constexpr, VECTOR: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Selects in a row of at most SIZE tokens, which is read once. Returns the number of bits set."""
    whole, q = quanta(mass, tl.arange(0, SIZE), length, head, tail, VECTOR)
    need = tl.full([], 0, tl.int32)
    if WEIGHED:
        need = _missing(tl.sum(whole, 0), tl.sum(tl.maximum(q, 0), 0), p_fixed)
    threshold, search = _search_needed(need, lower, upper, tail - head, WEIGHED)
    skip = tl.full([], 0, tl.int32)
    if search:
        threshold, skip = find_in_registers(q, need, lower, upper, WEIGHED, COUNTED, FUSED)
    seen = tl.full([], 0, tl.int32)
    _, count = _write(q, 0, length, threshold, skip, seen, bits, words, UNION, SIZE)
    return count + _write_rest(SIZE // 32, bits, words, UNION, 1024)


@triton.jit
def _streamed_row(
    mass, length, head, tail, bits, words, p_fixed, lower, upper,
    WEIGHED: tl.constexpr, COUNTED: tl.constexpr, UNION: tl.constexpr, FUSED: tl.constexpr, VECTOR: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Selects in a row of any length, which is read about a dozen times. Returns the number of bits set."""
    need = tl.full([], 0, tl.int32)
    if WEIGHED:
        whole = tl.zeros([TILE], tl.int32)
        part = tl.zeros([TILE], tl.int32)
        for start in tl.range(0, length, TILE, num_stages=STAGES):
            every, q = quanta(mass, start + tl.arange(0, TILE), length, head, tail, VECTOR)
            whole += every
            part += tl.maximum(q, 0)
        need = _missing(tl.sum(whole, 0), tl.sum(part, 0), p_fixed)
    threshold, search = _search_needed(need, lower, upper, tail - head, WEIGHED)
    skip = tl.full([], 0, tl.int32)
    if search:
        threshold, skip = find_in_memory(
            mass, length, head, tail, need, lower, upper, WEIGHED, COUNTED, FUSED, VECTOR, TILE, STAGES
        )
    seen = tl.full([], 0, tl.int32)
    count = tl.full([], 0, tl.int32)
    for start in range(0, words * 32, TILE):
        _, q = quanta(mass, start + tl.arange(0, TILE), length, head, tail, VECTOR)
        seen, found = _write(q, start, length, threshold, skip, seen, bits, words, UNION, TILE)
        count += found
    return count


@triton.jit
def _top_p_kernel(
    mass, lens, bits, counts, stride_m, stride_b, words, p_fixed, f_fixed, min_tokens, max_tokens, sink, recent,
    WEIGHED: tl.constexpr, COUNTED: tl.constexpr, UNION: tl.constexpr, FUSED: tl.constexpr, VECTOR: tl.constexpr,
    SMALL: tl.constexpr, SIZE: tl.constexpr, LONGER: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    mass += row * stride_m
    bits += row * stride_b
    length = tl.load(lens + row)
    head = tl.minimum(sink, length)
    tail = tl.maximum(length - recent, head)
    lower, upper = _limits(length, head + length - tail, f_fixed, min_tokens, max_tokens)
    # The buffer is as wide as the longest row that a server accepts, but the work depends on this row's length.
    if length <= SMALL:
        count = _resident_row(
            mass, length, head, tail, bits, words, p_fixed, lower, upper, WEIGHED, COUNTED, UNION, FUSED, VECTOR, SMALL
        )
    elif length <= SIZE:
        count = _resident_row(
            mass, length, head, tail, bits, words, p_fixed, lower, upper, WEIGHED, COUNTED, UNION, FUSED, VECTOR, SIZE
        )
    else:
        count = tl.full([], 0, tl.int32)
        if LONGER:
            count = _streamed_row(
                mass, length, head, tail, bits, words, p_fixed, lower, upper, WEIGHED, COUNTED, UNION, FUSED, VECTOR,
                TILE, STAGES,
            )  # fmt: skip
    tl.store(counts + row, count)


@checked(contracts.select_top_p)
def select_top_p(
    mass, lens, bits, counts, top_p, min_tokens, max_tokens, max_fraction, sink, recent, union=False
) -> None:
    rows, width = mass.shape
    if rows == 0:
        return
    p_fixed = ALL if top_p >= 1 else round(top_p * 65536)
    f_fixed = round(max_fraction * 65536)
    # The threshold is by weight, by number, or by both; each has its own compiled kernel.
    weighed = top_p < 1
    counted = not weighed or min_tokens > 0 or max_tokens >= 0 or f_fixed < 65536
    size = min(max(triton.next_power_of_2(width), 32 * PACK * MIN_WARPS), RESIDENT)
    warps = min(max(size // (32 * PER_THREAD), MIN_WARPS), 32)
    # Predicated adds need whole packs: with fewer tokens, threads would hold copies of the same tokens.
    fused = FUSED and isinstance(_top_p_kernel, triton.JITFunction) and size >= 32 * PACK * warps
    _top_p_kernel[(rows,)](
        mass, lens, bits, counts, mass.stride(0), bits.stride(0), bits.shape[1], p_fixed, f_fixed, min_tokens,
        max_tokens, sink, recent,
        WEIGHED=weighed, COUNTED=counted, UNION=union,
        FUSED=fused, VECTOR=1 if width % 4 else 4,
        SMALL=min(max(size // 8, 32 * PACK * warps), size), SIZE=size, LONGER=width > size,
        TILE=TILE // 2 if weighed and counted else TILE, STAGES=STAGES,
        num_warps=warps,
    )  # fmt: skip
