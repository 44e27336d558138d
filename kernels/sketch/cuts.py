"""Finds a score threshold for each KV head from the histograms of a scan, without sorting.

A head's free tokens are taken from the highest bin down; in the last bin, the most recent tokens are taken. Forced
tokens (the first ``sink`` and the last ``recent`` of the context) and the step's own tokens are always read. With n
tokens to read from a context of c tokens, f of them forced:

    share = (c * F + 65535) >> 16                                F = round(ratio * 65536)
    n     = min(max_tokens, max(share, min_tokens)), at least f, at most c

Budget shared by ``none``: each head takes n - f free tokens. Shared by ``heads``: the H heads of a layer together take
H (n - f), with one threshold over their scores, but each takes at least the floor, min(n, min_tokens) - f. Shared by
``layers``: the heads of all layers take n - f on average, with one threshold per request. It is the threshold that
would have met the budget in the request's last step (``carry_thresholds``, once per step, before the first layer),
because the scores of later layers are not known yet. A request's first step has no such threshold and shares by heads.
``top_p``: each head takes the fewest free tokens that, with the forced ones, hold that share of its estimated attention
(the sum of exp((bin + 1/2) / 12.75 - 16)); the number stays between the floor and n.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..contracts import checked
from . import contracts
from .contracts import CHUNK, LOWEST, PER_NAT, Budget

CHUNKS = 16  # chunks that are read at once
NUM_WARPS = 4


@triton.jit
def _limits(context, fixed_ratio, min_tokens, max_tokens, sink, recent):
    """(most, floor, forced) tokens of a head."""
    forced = tl.minimum(context, tl.minimum(sink, context) + tl.minimum(recent, context))  # may be 2^31 - 1 each
    most = tl.maximum(((context.to(tl.int64) * fixed_ratio + 65535) >> 16).to(tl.int32), min_tokens)
    if max_tokens >= 0:
        most = tl.minimum(most, max_tokens)
    most = tl.minimum(tl.maximum(most, forced), context)
    return most, tl.maximum(tl.minimum(min_tokens, most), forced), forced


@triton.jit
def _shared_number(counts, from_bin, floor, number, h, heads, H: tl.constexpr, BINS: tl.constexpr):
    """Free tokens of head h if all heads share a budget of ``number`` times the number of heads. counts [H, BINS]:
    tokens in each bin; from_bin [H, BINS]: tokens in this bin and all higher ones."""
    all_heads = tl.arange(0, H)
    live = all_heads < heads
    bins = tl.arange(0, BINS)[None, :]
    taken = tl.where(live[:, None], tl.maximum(from_bin, floor), 0)
    budget = number * heads
    # The lowest bin from which on all tokens fit into the budget; BINS if not even those of the highest bin fit.
    cut = tl.sum((tl.sum(taken, 0) > budget).to(tl.int32), 0)
    sure = tl.where(live, tl.maximum(tl.sum(tl.where(bins >= cut, counts, 0), 1), floor), 0)
    more = tl.where(live, tl.maximum(tl.sum(tl.where(bins >= cut - 1, counts, 0), 1), floor), 0) - sure
    left = budget - tl.sum(sure, 0)
    before = tl.cumsum(more, 0) - more
    mine = sure + tl.minimum(tl.maximum(left - before, 0), more)
    return tl.sum(tl.where(all_heads == h, mine, 0), 0)


@triton.jit
def _number_that_holds(counts, from_bin, forced_weight, top_p, lowest, per_nat, BINS: tl.constexpr):
    """The fewest free tokens that, with the forced ones, hold top_p of all weight; counts, from_bin [BINS]."""
    bins = tl.arange(0, BINS)
    weight = tl.exp((bins + 0.5) / per_nat + lowest)
    held = tl.cumsum(counts * weight, 0, reverse=True)
    need = (tl.sum(counts * weight, 0) + forced_weight) * top_p - forced_weight
    cut = tl.sum((held >= need).to(tl.int32), 0) - 1  # the highest bin down to which tokens are enough; -1: none
    at = bins == cut
    above = tl.sum(tl.where(at, from_bin - counts, 0), 0)
    missing = need - tl.sum(tl.where(at, held - counts * weight, 0.0), 0)
    more = tl.ceil(missing / tl.sum(tl.where(at, weight, 0.0), 0)).to(tl.int32)
    number = above + tl.minimum(tl.maximum(more, 0), tl.sum(tl.where(at, counts, 0), 0))
    everything = tl.sum(counts, 0)
    return tl.where(need <= 0, 0, tl.where(cut < 0, everything, number))


@triton.jit
def _forced_weight(scores, context, sink, recent, lowest, per_nat, BLOCK: tl.constexpr):
    """Weight of the forced tokens, from their bins."""
    total = tl.zeros([BLOCK], tl.float32)
    forced = tl.minimum(context, tl.minimum(sink, context) + tl.minimum(recent, context))
    for start in range(0, forced, BLOCK):
        j = start + tl.arange(0, BLOCK)
        p = tl.where(j < sink, j, context - forced + j)
        bin = tl.load(scores + p, mask=j < forced, other=0).to(tl.float32)
        total += tl.where(j < forced, tl.exp((bin + 0.5) / per_nat + lowest), 0.0)
    return tl.sum(total, 0)


@triton.jit
def _slot(slots, r, num_slots):
    slot = tl.load(slots + r)
    return tl.where(slot < 0, num_slots - 1, slot).to(tl.int64)


@triton.jit
def _carry_kernel(
    query_start_loc, seq_lens, slots, totals, thresholds, fixed_ratio, min_tokens, max_tokens, sink, recent, num_slots,
    BINS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0)
    q_len = tl.load(query_start_loc + r + 1) - tl.load(query_start_loc + r)
    context = tl.maximum(tl.load(seq_lens + r) - q_len, 0)
    most, _, forced = _limits(context, fixed_ratio, min_tokens, max_tokens, sink, recent)
    slot = _slot(slots, r, num_slots)
    totals += slot * (BINS + 2)
    bins = tl.arange(0, BINS)
    counts = tl.load(totals + bins).to(tl.int64)
    heads = tl.load(totals + BINS).to(tl.int64)
    beyond = tl.load(totals + BINS + 1)
    number = heads * (most - forced) - beyond
    from_bin = tl.cumsum(counts, 0, reverse=True)
    threshold = tl.maximum(tl.sum((from_bin >= number).to(tl.int32), 0) - 1, 0)
    tied = tl.sum(tl.where(bins == threshold, counts, 0), 0)
    above = tl.sum(tl.where(bins > threshold, counts, 0), 0)
    part = tl.minimum(tl.maximum(number - above, 0) * 65536 // tl.maximum(tied, 1), 65536)
    tl.store(thresholds + slot * 2, tl.where(heads > 0, threshold, -1))
    tl.store(thresholds + slot * 2 + 1, part.to(tl.int32))
    tl.debug_barrier()  # all threads must have loaded the totals before they are zeroed
    tl.store(totals + bins, tl.zeros([BINS], tl.int32))
    tl.store(totals + BINS, 0)
    tl.store(totals + BINS + 1, 0)


@checked(contracts.carry_thresholds)
def carry_thresholds(query_start_loc, seq_lens, slots, totals, thresholds, budget: Budget) -> None:
    """Once per step: find each request's threshold from the totals of its last step, and zero the totals."""
    if seq_lens.shape[0] == 0:
        return
    _carry_kernel[(seq_lens.shape[0],)](
        query_start_loc, seq_lens, slots, totals, thresholds, budget.fixed_ratio, budget.min_tokens, budget.max_tokens,
        budget.sink, budget.recent, totals.shape[0], BINS=contracts.BINS, num_warps=NUM_WARPS,
    )  # fmt: skip


@triton.jit
def _cuts_kernel(
    histogram, chunks, query_start_loc, seq_lens, dense, scores, slots, totals, thresholds, cuts, starts,
    fixed_ratio, top_p, min_tokens, max_tokens, sink, recent, lowest, per_nat, heads, num_slots,
    stride_hr, stride_kr, stride_kh, stride_sr, stride_sh, stride_cr, stride_tr, stride_th,
    H: tl.constexpr, HEADS: tl.constexpr, LAYERS: tl.constexpr, TOP_P: tl.constexpr, CHUNK: tl.constexpr,
    BINS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0)
    r = tl.program_id(1).to(tl.int64)
    q_len = tl.load(query_start_loc + r + 1) - tl.load(query_start_loc + r)
    context = tl.maximum(tl.load(seq_lens + r) - q_len, 0)
    most, floor, forced = _limits(context, fixed_ratio, min_tokens, max_tokens, sink, recent)
    cuts += r * stride_cr + h * 2
    # With top_p, a head may read less than ``most``, so only the floor decides here.
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
    else:
        carried, part, slot = -1, 0, tl.full([], 0, tl.int64)
        if LAYERS:
            slot = _slot(slots, r, num_slots)
            carried = tl.load(thresholds + slot * 2)
            part = tl.load(thresholds + slot * 2 + 1)
        if carried >= 0:
            tied = tl.sum(tl.where(bins == carried, mine, 0), 0).to(tl.int64)
            above = tl.sum(tl.where(bins > carried, mine, 0), 0)
            share = above + ((tied * part + 32768) >> 16).to(tl.int32)
            number = tl.maximum(share, floor - forced)
            tl.atomic_add(totals + slot * (BINS + 2) + BINS + 1, number - share, sem="relaxed")
        elif HEADS or LAYERS:
            all_heads = tl.arange(0, H)
            where = histogram + r * stride_hr + all_heads[:, None] * BINS + bins[None, :]
            counts = tl.load(where, mask=(all_heads < heads)[:, None], other=0)
            all_from = tl.cumsum(counts, 1, reverse=True)
            number = _shared_number(counts, all_from, floor - forced, number, h, heads, H, BINS)
        if LAYERS:
            tl.atomic_add(totals + slot * (BINS + 2) + bins, mine, mask=mine > 0, sem="relaxed")
            tl.atomic_add(totals + slot * (BINS + 2) + BINS, 1, sem="relaxed")
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
        chunk = tl.load(chunks + c[:, None] * BINS + bins[None, :], mask=inside[:, None], other=0).to(tl.int32)
        higher = tl.sum(tl.where(bins[None, :] > threshold, chunk, 0), 1)
        equal = tl.sum(tl.where(bins[None, :] == threshold, chunk, 0), 1)
        tl.store(starts + c * 2, above_before + tl.cumsum(higher, 0) - higher, mask=inside)
        tl.store(starts + c * 2 + 1, tied_before + tl.cumsum(equal, 0) - equal, mask=inside)
        above_before += tl.sum(higher, 0)
        tied_before += tl.sum(equal, 0)


@checked(contracts.cut_scores)
def cut_scores(
    histogram, chunks, query_start_loc, seq_lens, dense, scores, slots, totals, thresholds, budget: Budget, cuts, starts
) -> None:
    rows, heads, _ = histogram.shape
    if rows == 0:
        return
    _cuts_kernel[(heads, rows)](
        histogram, chunks, query_start_loc, seq_lens, dense, scores, slots, totals, thresholds, cuts, starts,
        budget.fixed_ratio, budget.top_p or 0.0, budget.min_tokens, budget.max_tokens, budget.sink, budget.recent,
        LOWEST, PER_NAT, heads, totals.shape[0], histogram.stride(0), *chunks.stride()[:2], *scores.stride()[:2],
        cuts.stride(0), *starts.stride()[:2], H=triton.next_power_of_2(heads), HEADS=budget.shared == "heads",
        LAYERS=budget.shared == "layers", TOP_P=budget.top_p is not None, CHUNK=CHUNK, BINS=contracts.BINS,
        CHUNKS=CHUNKS, num_warps=NUM_WARPS,
    )  # fmt: skip
