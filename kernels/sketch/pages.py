"""From scores to the page table of a step: how much each KV head reads, and which tokens these are. Nothing is sorted.

Everything is decided from the histogram: a head's free tokens are taken from the highest bin down, and of the bin in
which its number is reached the latest ones. Forced tokens (the first ``sink`` and the last ``recent`` of the context)
and the step's own tokens are always read. With n tokens wanted of a context of c, f of which are forced:

    share = (c * F + 65535) >> 16                                F = round(ratio * 65536)
    n     = min(max_tokens, max(share, min_tokens)), at least f, at most c

``ratio`` alone: each head takes n - f free tokens. ``shared``: a layer's H heads take H (n - f) together, by one
threshold over their scores, but each the floor, min(n, min_tokens) - f, at least. ``top_p``: each takes the fewest free
tokens with which, and with the forced ones, it holds that share of its estimated attention (the sum of
exp((bin + 1/2) / 12.75 - 16)); between the floor and n.

scores           [R, H, L]      uint8, of the context, from ``scores``
histogram        [R, H, 256]    int32, of the free tokens
query_start_loc  [R+1]          int32
seq_lens         [R]            int32, the step's own tokens included; 0 = padded row: kept = 0
dense            [R]            int32, not 0: every token is listed; so it is where no head can do with less
block_table      [R, nb]        int32
page_strides                    rows of 2D elements between neighbouring blocks, heads and tokens of the cache
page_table       [R, H, width]  int32, written: ids of the pages to read, one for each token and head, by position
                                ascending; entries past kept stay, and nothing is written past width
kept             [R, H]         int32, written
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import contracts
from .contracts import LOWEST, PER_NAT, Budget

CHUNK = 4096  # tokens of a program
NUM_WARPS = 8


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
def _pages_kernel(
    scores, histogram, query_start_loc, seq_lens, dense, block_table, page_table, kept,
    fixed_ratio, top_p, min_tokens, max_tokens, sink, recent, lowest, per_nat,
    block_size, per_block, per_head, per_token, width, heads,
    stride_sr, stride_sh, stride_hr, stride_tr, stride_pr, stride_ph, stride_kr,
    H: tl.constexpr, SHARED: tl.constexpr, TOP_P: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    h = tl.program_id(1)
    r = tl.program_id(2).to(tl.int64)
    length = tl.minimum(tl.load(seq_lens + r), width)
    kept += r * stride_kr + h
    first = chunk * CHUNK
    if first >= length:
        if chunk == 0:
            tl.store(kept, 0)
        return
    q_len = tl.load(query_start_loc + r + 1) - tl.load(query_start_loc + r)
    context = tl.maximum(length - q_len, 0)
    most, floor, forced = _limits(context, fixed_ratio, min_tokens, max_tokens, sink, recent)
    # With top_p, how much is read may still be less than what may be.
    everything = (tl.load(dense + r) != 0) | ((floor if TOP_P else most) >= context)
    scores += r * stride_sr + h * stride_sh
    head, tail = tl.minimum(sink, context), tl.maximum(context - recent, 0)
    threshold, skip, before = -1, 0, first
    ties_before = 0
    if not everything:
        bins = tl.arange(0, BINS)
        mine = tl.load(histogram + r * stride_hr + h * BINS + bins)
        from_bin = tl.cumsum(mine, 0, reverse=True)
        number = most - forced
        if TOP_P:
            weight = _forced_weight(scores, context, sink, recent, lowest, per_nat, BINS)
            number = _number_that_holds(mine, from_bin, weight, top_p, lowest, per_nat, BINS)
            number = tl.minimum(tl.maximum(number, floor - forced), most - forced)
        elif SHARED:
            all_heads = tl.arange(0, H)
            where = histogram + r * stride_hr + all_heads[:, None] * BINS + bins[None, :]
            counts = tl.load(where, mask=(all_heads < heads)[:, None], other=0)
            all_from = tl.cumsum(counts, 1, reverse=True)
            number = _shared_number(counts, all_from, floor - forced, number, h, heads, H, BINS)
        threshold = tl.sum((from_bin >= number).to(tl.int32), 0) - 1
        skip = tl.sum(tl.where(bins == threshold, from_bin, 0), 0) - number
        # What the chunks before this one keep.
        sure = tl.zeros([CHUNK], tl.int32)
        tied = tl.zeros([CHUNK], tl.int32)
        for start in range(0, first, CHUNK):
            p = start + tl.arange(0, CHUNK)
            free = (p >= head) & (p < tail)
            score = tl.load(scores + p, mask=free, other=0).to(tl.int32)
            sure += ((free & (score > threshold)) | ((p < context) & (free == 0)) | (p >= context)).to(tl.int32)
            tied += (free & (score == threshold)).to(tl.int32)
        ties_before = tl.sum(tied, 0)
        before = tl.sum(sure, 0) + tl.maximum(ties_before - skip, 0)
    p = first + tl.arange(0, CHUNK)
    free = (p >= head) & (p < tail)
    score = tl.load(scores + p, mask=free & (threshold >= 0), other=0).to(tl.int32)
    tie = free & (score == threshold)
    rank = ties_before + tl.cumsum(tie.to(tl.int32), 0)  # counted from 1
    keep = (p < length) & ((free == 0) | (score > threshold) | (tie & (rank > skip)))
    column = before + tl.cumsum(keep.to(tl.int32), 0) - 1
    block = tl.load(block_table + r * stride_tr + p // block_size, mask=keep, other=0)
    page = block * per_block + (p % block_size) * per_token + h * per_head
    tl.store(page_table + r * stride_pr + h * stride_ph + column, page, mask=keep)
    if chunk == (length - 1) // CHUNK:
        tl.store(kept, before + tl.sum(keep.to(tl.int32), 0))


def select_pages(
    scores: torch.Tensor, histogram: torch.Tensor, query_start_loc: torch.Tensor, seq_lens: torch.Tensor,
    dense: torch.Tensor, block_table: torch.Tensor, block_size: int, page_strides: tuple[int, int, int],
    budget: Budget, page_table: torch.Tensor, kept: torch.Tensor,
) -> None:  # fmt: skip
    """Launch on the current stream, without waiting for the device; arguments as in the module's text."""
    contracts.select_pages(
        scores, histogram, query_start_loc, seq_lens, dense, block_table, block_size, page_strides, page_table, kept
    )
    rows, heads, width = page_table.shape
    if rows == 0:
        return
    # One chunk at least: the first also writes the zeros of padded rows.
    _pages_kernel[(max(triton.cdiv(width, CHUNK), 1), heads, rows)](
        scores, histogram, query_start_loc, seq_lens, dense, block_table, page_table, kept,
        budget.fixed_ratio, budget.top_p or 0.0, budget.min_tokens, budget.max_tokens, budget.sink, budget.recent,
        LOWEST, PER_NAT, block_size, *page_strides, width, heads,
        *scores.stride()[:2], histogram.stride(0), block_table.stride(0), *page_table.stride()[:2], kept.stride(0),
        H=triton.next_power_of_2(heads), SHARED=budget.shared, TOP_P=budget.top_p is not None, CHUNK=CHUNK,
        BINS=contracts.BINS, num_warps=NUM_WARPS,
    )  # fmt: skip
