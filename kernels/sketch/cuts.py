"""How much each KV head reads, from the histograms of a scan: a threshold for its scores. Nothing is sorted.

A head's free tokens are taken from the highest bin down, and of the bin in which its number is reached the latest ones.
Forced tokens (the first ``sink`` and the last ``recent`` of the context) and the step's own tokens are always read.
With n tokens wanted of a context of c, f of which are forced:

    share = (c * F + 65535) >> 16                                F = round(ratio * 65536)
    n     = min(max_tokens, max(share, min_tokens)), at least f, at most c

``ratio`` alone: each head takes n - f free tokens. ``shared``: a layer's H heads take H (n - f) together, by one
threshold over their scores, but each the floor, min(n, min_tokens) - f, at least. ``top_p``: each takes the fewest free
tokens with which, and with the forced ones, it holds that share of its estimated attention (the sum of
exp((bin + 1/2) / 12.75 - 16)); between the floor and n.

histogram        [R, H, 256]       int32, of the free tokens of the context
chunks           [R, H, C, 256]    int16, the same of each chunk of 2,048 tokens
query_start_loc  [R+1]             int32
seq_lens         [R]               int32, the step's own tokens included; 0 = padded row
dense            [R]               int32, not 0: every token is read; so it is where no head can do with less
scores           [R, H, L]         uint8, read with ``top_p`` alone, for the weight of the forced tokens
cuts             [R, H, 2]         int32, written: (threshold, skip): free tokens of bins above the threshold are read,
                                   and of the threshold's own bin all but the first ``skip``; threshold -1: all tokens
starts           [R, H, C, 2]      int32, written where the threshold is not -1: free tokens above the threshold, and in
                                   its bin, in the chunks before each chunk that holds a part of the context
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import contracts
from .contracts import CHUNK, LOWEST, PER_NAT, Budget

CHUNKS = 16  # at a time
NUM_WARPS = 4


@triton.jit
def _limits(context, fixed_ratio, min_tokens, max_tokens, sink, recent):
    """(most, floor, forced) tokens of a head."""
    forced = tl.minimum(context, sink + recent)
    most = tl.maximum(((context.to(tl.int64) * fixed_ratio + 65535) >> 16).to(tl.int32), min_tokens)
    if max_tokens >= 0:
        most = tl.minimum(most, max_tokens)
    most = tl.minimum(tl.maximum(most, forced), context)
    return most, tl.maximum(tl.minimum(min_tokens, most), forced), forced


@triton.jit
def _shared_number(counts, from_bin, floor, number, h, heads, H: tl.constexpr, BINS: tl.constexpr):
    """Free tokens of head h where all heads share ``number`` times their number; counts and from_bin [H, BINS]: tokens
    of each bin, and of it and all higher ones."""
    all_heads = tl.arange(0, H)
    live = all_heads < heads
    bins = tl.arange(0, BINS)[None, :]
    taken = tl.where(live[:, None], tl.maximum(from_bin, floor), 0)
    budget = number * heads
    # The lowest bin from which on all tokens can be taken; BINS if not even those of the highest.
    cut = tl.sum((tl.sum(taken, 0) > budget).to(tl.int32), 0)
    sure = tl.where(live, tl.maximum(tl.sum(tl.where(bins >= cut, counts, 0), 1), floor), 0)
    more = tl.where(live, tl.maximum(tl.sum(tl.where(bins >= cut - 1, counts, 0), 1), floor), 0) - sure
    left = budget - tl.sum(sure, 0)
    before = tl.cumsum(more, 0) - more
    mine = sure + tl.minimum(tl.maximum(left - before, 0), more)
    return tl.sum(tl.where(all_heads == h, mine, 0), 0)


@triton.jit
def _number_that_holds(counts, from_bin, forced_weight, top_p, lowest, per_nat, BINS: tl.constexpr):
    """The fewest free tokens that hold top_p of all weight together with the forced ones; counts, from_bin [BINS]."""
    bins = tl.arange(0, BINS)
    weight = tl.exp((bins + 0.5) / per_nat + lowest)
    held = tl.cumsum(counts * weight, 0, reverse=True)
    need = (tl.sum(counts * weight, 0) + forced_weight) * top_p - forced_weight
    cut = tl.sum((held >= need).to(tl.int32), 0) - 1  # the highest bin with which it is enough; -1: none is
    at = bins == cut
    above = tl.sum(tl.where(at, from_bin - counts, 0), 0)
    missing = need - tl.sum(tl.where(at, held - counts * weight, 0.0), 0)
    more = tl.ceil(missing / tl.sum(tl.where(at, weight, 0.0), 0)).to(tl.int32)
    number = above + tl.minimum(tl.maximum(more, 0), tl.sum(tl.where(at, counts, 0), 0))
    everything = tl.sum(counts, 0)
    return tl.where(need <= 0, 0, tl.where(cut < 0, everything, number))


@triton.jit
def _forced_weight(scores, context, sink, recent, lowest, per_nat, BLOCK: tl.constexpr):
    """Weight of the tokens that are read anyway, from their bins."""
    total = tl.zeros([BLOCK], tl.float32)
    forced = tl.minimum(context, sink + recent)
    for start in range(0, forced, BLOCK):
        j = start + tl.arange(0, BLOCK)
        p = tl.where(j < sink, j, context - forced + j)
        bin = tl.load(scores + p, mask=j < forced, other=0).to(tl.float32)
        total += tl.where(j < forced, tl.exp((bin + 0.5) / per_nat + lowest), 0.0)
    return tl.sum(total, 0)


@triton.jit
def _cuts_kernel(
    histogram, chunks, query_start_loc, seq_lens, dense, scores, cuts, starts,
    fixed_ratio, top_p, min_tokens, max_tokens, sink, recent, lowest, per_nat, heads,
    stride_hr, stride_kr, stride_kh, stride_sr, stride_sh, stride_cr, stride_tr, stride_th,
    H: tl.constexpr, SHARED: tl.constexpr, TOP_P: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0)
    r = tl.program_id(1).to(tl.int64)
    q_len = tl.load(query_start_loc + r + 1) - tl.load(query_start_loc + r)
    context = tl.maximum(tl.load(seq_lens + r) - q_len, 0)
    most, floor, forced = _limits(context, fixed_ratio, min_tokens, max_tokens, sink, recent)
    cuts += r * stride_cr + h * 2
    # With top_p, how much is read may still be less than what may be.
    if (tl.load(dense + r) != 0) | ((floor if TOP_P else most) >= context):
        tl.store(cuts, -1)
        tl.store(cuts + 1, 0)
        return
    bins = tl.arange(0, BINS)
    mine = tl.load(histogram + r * stride_hr + h * BINS + bins)
    from_bin = tl.cumsum(mine, 0, reverse=True)
    number = most - forced
    if TOP_P:
        weight = _forced_weight(scores + r * stride_sr + h * stride_sh, context, sink, recent, lowest, per_nat, BINS)
        number = _number_that_holds(mine, from_bin, weight, top_p, lowest, per_nat, BINS)
        number = tl.minimum(tl.maximum(number, floor - forced), most - forced)
    elif SHARED:
        all_heads = tl.arange(0, H)
        where = histogram + r * stride_hr + all_heads[:, None] * BINS + bins[None, :]
        counts = tl.load(where, mask=(all_heads < heads)[:, None], other=0)
        all_from = tl.cumsum(counts, 1, reverse=True)
        number = _shared_number(counts, all_from, floor - forced, number, h, heads, H, BINS)
    threshold = tl.maximum(tl.sum((from_bin >= number).to(tl.int32), 0) - 1, 0)
    tl.store(cuts, threshold)
    tl.store(cuts + 1, tl.sum(tl.where(bins == threshold, from_bin, 0), 0) - number)
    above_before = tl.full([], 0, tl.int32)
    tied_before = tl.full([], 0, tl.int32)
    chunks += r * stride_kr + h * stride_kh
    starts += r * stride_tr + h * stride_th
    for first in range(0, (context + CHUNK - 1) // CHUNK, CHUNKS):
        c = first + tl.arange(0, CHUNKS)
        inside = c * CHUNK < context
        part = tl.load(chunks + c[:, None] * BINS + bins[None, :], mask=inside[:, None], other=0).to(tl.int32)
        above = tl.sum(tl.where(bins[None, :] > threshold, part, 0), 1)
        tied = tl.sum(tl.where(bins[None, :] == threshold, part, 0), 1)
        tl.store(starts + c * 2, above_before + tl.cumsum(above, 0) - above, mask=inside)
        tl.store(starts + c * 2 + 1, tied_before + tl.cumsum(tied, 0) - tied, mask=inside)
        above_before += tl.sum(above, 0)
        tied_before += tl.sum(tied, 0)


def cut_scores(
    histogram: torch.Tensor, chunks: torch.Tensor, query_start_loc: torch.Tensor, seq_lens: torch.Tensor,
    dense: torch.Tensor, scores: torch.Tensor, budget: Budget, cuts: torch.Tensor, starts: torch.Tensor,
) -> None:  # fmt: skip
    """Launch on the current stream, without waiting for the device; arguments as in the module's text."""
    contracts.cut_scores(histogram, chunks, query_start_loc, seq_lens, dense, cuts, starts, scores)
    rows, heads, _ = histogram.shape
    if rows == 0:
        return
    _cuts_kernel[(heads, rows)](
        histogram, chunks, query_start_loc, seq_lens, dense, scores, cuts, starts,
        budget.fixed_ratio, budget.top_p or 0.0, budget.min_tokens, budget.max_tokens, budget.sink, budget.recent,
        LOWEST, PER_NAT, heads, histogram.stride(0), *chunks.stride()[:2], *scores.stride()[:2], cuts.stride(0),
        *starts.stride()[:2], H=triton.next_power_of_2(heads), SHARED=budget.shared, TOP_P=budget.top_p is not None,
        CHUNK=CHUNK, BINS=contracts.BINS, CHUNKS=CHUNKS, num_warps=NUM_WARPS,
    )  # fmt: skip
