"""How far down a ranking one has to go for a share of another mass: sizes of selections that somebody else makes.

    order      the first ``sink`` and the last ``recent`` positions, then the others by ranking, descending
    counts[x]  length of the shortest such prefix of row x that holds ``share`` of sum_p weights[x, p],  p < lens[x]

With the target's attention for weights and the draft's for the ranking, that is how many tokens of the draft's choice
hold so much of what the target attended to, also where the draft foresees it badly.

weights       [X, L]  float32, nonnegative, a row's sum below 2; positions from lens on are never read
ranking       [Y, L]  float32, nonnegative; rows[x] is the row that ranks row x of the weights. Without rows, Y = X
lens          [X]     int32, at most L; 0 = padded row: counts 0, and rows[x] is not followed
counts        [X]     int32, out
share         float   on the host, above 0, at most 1
sink, recent  int     on the host; where they overlap a token counts once
rows          [X]     int64, on the device, or None

Counted in integers, so the same on every device and in any order: weights as int(weight * 2^30), the share as in
``select_top_p``. The ranking is compared by its upper 16 bits, as bfloat16 that is cut off, and tokens that agree in
these are taken all or none: a count needs no finer order, and the search has eight steps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import contracts

# Not measured: eight positions of each of 256 threads, of two rows.
BLOCK = 2048
NUM_WARPS = 8


@triton.jit
def _tokens(weights, ranking, p, length, sink, tail):
    """Of positions p: fixed-point weight, the upper half of what ranks them, and whether they are ranked."""
    inside = p < length
    weight = (tl.load(weights + p, mask=inside, other=0.0) * 1073741824.0).to(tl.int32)
    key = tl.load(ranking + p, mask=inside, other=0.0).to(tl.int32, bitcast=True) >> 16
    return weight, key, inside & (p >= sink) & (p < tail)


@triton.jit
def _count_kernel(
    weights, ranking, lens, counts, rows, target, sink, recent, stride_w, stride_r,
    MAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    x = tl.program_id(0).to(tl.int64)
    length = tl.load(lens + x)
    if length <= 0:
        tl.store(counts + x, 0)
        return
    row = x
    if MAPPED:
        row = tl.load(rows + x)
    weights += x * stride_w
    ranking += row * stride_r
    sink = tl.minimum(sink, length)
    tail = tl.maximum(length - recent, sink)
    column = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    held = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, length, BLOCK):
        weight, key, ranked = _tokens(weights, ranking, begin + column, length, sink, tail)
        total += weight
        held += tl.where(ranked, 0, weight)
    need = ((tl.sum(total, 0).to(tl.int64) * target + 65535) >> 16).to(tl.int32)
    need -= tl.sum(held, 0)
    forced = sink + length - tail
    if need <= 0:
        tl.store(counts + x, forced)
        return
    # The largest threshold from which on there is enough, two bits a step.
    threshold = need * 0
    for digit in range(8):
        step = 16384 >> (2 * digit)
        first = tl.zeros([BLOCK], tl.int32)
        second = tl.zeros([BLOCK], tl.int32)
        third = tl.zeros([BLOCK], tl.int32)
        for begin in range(0, length, BLOCK):
            weight, key, ranked = _tokens(weights, ranking, begin + column, length, sink, tail)
            weight = tl.where(ranked, weight, 0)
            first += tl.where(key >= threshold + step, weight, 0)
            second += tl.where(key >= threshold + 2 * step, weight, 0)
            third += tl.where(key >= threshold + 3 * step, weight, 0)
        enough = (tl.sum(first, 0) >= need).to(tl.int32) + (tl.sum(second, 0) >= need).to(tl.int32)
        threshold += step * (enough + (tl.sum(third, 0) >= need).to(tl.int32))
    taken = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, length, BLOCK):
        weight, key, ranked = _tokens(weights, ranking, begin + column, length, sink, tail)
        taken += (ranked & (key >= threshold)).to(tl.int32)
    tl.store(counts + x, forced + tl.sum(taken, 0))


def count_ranked(
    weights: torch.Tensor, ranking: torch.Tensor, lens: torch.Tensor, counts: torch.Tensor, share: float, sink: int,
    recent: int, rows: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Launch on the current stream, without waiting for the device; arguments as in the module's text."""
    contracts.count_ranked(weights, ranking, lens, counts, share, sink, recent, rows)
    if not counts.numel():
        return
    _count_kernel[(counts.shape[0],)](
        weights, ranking, lens, counts, lens if rows is None else rows, round(share * 65536), sink, recent,
        weights.stride(0), ranking.stride(0), MAPPED=rows is not None, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
