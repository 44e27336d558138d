"""Draws unread tokens of each KV head; those that the search thinks heavy more often (`contracts.py` says how).

One program takes one chunk of 2,048 tokens of one head. The sum of w over the chunks before it comes from their
histograms, so no program waits for another. The draws ascend: a program knows which of them fall into its chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..contracts import checked
from ..sketch.contracts import BINS, CHUNK
from . import contracts
from .contracts import JITTER_BITS, UNIFORM_PART, weight_table

CHUNKS = 16  # histograms that are read at once
NUM_WARPS = 4


@triton.jit
def _jitter(length, stream, i, BITS: tl.constexpr):
    """Pseudorandom integers below 2^BITS, the same as `reference.jitter`."""
    x = i.to(tl.uint32) * 0x9E3779B1 + length.to(tl.uint32) * 0x85EBCA77 + stream.to(tl.uint32) * 0x27D4EB2F
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x2C1B3C6D
    x ^= x >> 16
    return (x >> (32 - BITS)).to(tl.int64)


@triton.jit
def _sample_kernel(
    scores, histogram, chunks, cuts, starts, query_start_loc, seq_lens, table, positions, worth, sink, recent, layer,
    heads, stride_sr, stride_sh, stride_hr, stride_kr, stride_kh, stride_cr, stride_ar, stride_ah, stride_pr, stride_wr,
    BINS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, DRAWS: tl.constexpr, PART: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0)
    chunk = tl.program_id(1)
    r = tl.program_id(2).to(tl.int64)
    length = tl.load(seq_lens + r)
    context = length - (tl.load(query_start_loc + r + 1) - tl.load(query_start_loc + r))
    threshold = tl.load(cuts + r * stride_cr + h * 2)
    skip = tl.load(cuts + r * stride_cr + h * 2 + 1)
    first = chunk * CHUNK
    if (threshold < 0) | (first >= context):
        return
    bins = tl.arange(0, BINS)
    value = tl.load(table + bins)
    counts = tl.load(histogram + r * stride_hr + h * BINS + bins)
    counts = tl.where(bins < threshold, counts, tl.where(bins == threshold, tl.minimum(counts, skip), 0)).to(tl.int64)
    number = tl.sum(counts, 0)
    if number <= 0:
        return
    total = tl.sum(counts * value, 0)
    uniform = tl.maximum(total // (PART * number), 1)
    value += uniform
    total += uniform * number

    # The weight of the unread tokens before this chunk.
    starts += r * stride_ar + h * stride_ah
    tied_before = tl.load(starts + chunk * 2 + 1)
    chunks += r * stride_kr + h * stride_kh
    below = tl.zeros([BINS], tl.int64)
    for c in range(0, chunk, CHUNKS):
        row = c + tl.arange(0, CHUNKS)
        some = tl.load(
            chunks + row[:, None] * BINS + bins[None, :], mask=(row < chunk)[:, None] & (bins < threshold)[None, :],
            other=0,
        )  # fmt: skip
        below += tl.sum(some.to(tl.int64), 0)
    of_tie = tl.load(table + threshold) + uniform
    before = tl.sum(below * value, 0) + tl.minimum(tied_before, skip).to(tl.int64) * of_tie

    p = first + tl.arange(0, CHUNK)
    free = (p >= sink) & (p < context - recent)
    bin = tl.load(scores + r * stride_sr + h * stride_sh + p, mask=free, other=0).to(tl.int32)
    tie = free & (bin == threshold)
    unread = (free & (bin < threshold)) | (tie & (tied_before + tl.cumsum(tie.to(tl.int32), 0) <= skip))
    weight = tl.where(unread, tl.load(table + bin) + uniform, 0)
    ends = before + tl.cumsum(weight, 0)
    end = before + tl.sum(weight, 0)

    i = tl.arange(0, DRAWS)
    drawn = _jitter(length, layer * heads + h, i, BITS)
    within = tl.where(total >= 1024, (total >> 10) * drawn >> (BITS - 10), total * drawn >> BITS)
    point = (i.to(tl.int64) * total + within) // DRAWS
    low = tl.sum((point < before).to(tl.int32), 0)
    high = tl.sum((point < end).to(tl.int32), 0)
    positions += r * stride_pr + h * DRAWS
    worth += r * stride_wr + h * DRAWS
    for j in range(low, high):
        at = tl.sum(tl.where(i == j, point, 0), 0)
        index = tl.sum((ends <= at).to(tl.int32), 0)
        mine = tl.sum(tl.where(p == first + index, weight, 0), 0)
        tl.store(positions + j, first + index)
        tl.store(worth + j, total.to(tl.float32) / mine.to(tl.float32))


@checked(contracts.sample_unread)
def sample_unread(
    scores, histogram, chunks, cuts, starts, query_start_loc, seq_lens, sink, recent, layer, positions, worth
) -> None:
    rows, heads, draws = positions.shape
    positions.fill_(-1)
    if rows == 0:
        return
    _sample_kernel[(heads, triton.cdiv(scores.shape[2], CHUNK), rows)](
        scores, histogram, chunks, cuts, starts, query_start_loc, seq_lens, weight_table(scores.device), positions,
        worth, sink, recent, layer, heads, *scores.stride()[:2], histogram.stride(0), *chunks.stride()[:2],
        cuts.stride(0), *starts.stride()[:2], positions.stride(0), worth.stride(0),
        BINS=BINS, CHUNK=CHUNK, CHUNKS=CHUNKS, DRAWS=draws, PART=UNIFORM_PART, BITS=JITTER_BITS, num_warps=NUM_WARPS,
    )  # fmt: skip
