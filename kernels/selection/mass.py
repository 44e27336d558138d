"""Attention mass of each position: which scores make it, how it is summed, and how it is spread.

``accumulate_mass``: over the query heads of a score group,

    new[r, g, p] = weight * sum_{h in group g} exp(scores[r, h, p] - lse[r, h])        p < lens[r]
    mass[r, g, p] = new                       combine "store"
                  = mass[r, g, p] + new       combine "add"

With weight = G / Hq the mass of a row sums to at most 1 after "store". A caller that makes further calls must choose a
smaller weight so that this still holds, because ``select_top_p`` requires it.

``dilate_mass``: each position gets the largest mass of itself and of the few positions before it,

    out[x, p] = weight * max_{0 <= d <= steps, d <= p} mass[x, p - d]        p < lens[x]

A selection made from past attention can miss the tokens to which the next tokens attend: heads that copy text move on
by one position per token. If mass is spread by as many steps as tokens follow, it covers these positions.

``mark_rows``: the query rows of a verification whose scores are stored, and how many positions they rank.
For each request these are its first and its last query row: the first attends for the token that is drafted next, the
last for the tokens after the drafts. The choice does not depend on how many drafts will be accepted (Vegas, arXiv
2602.07223). Requests with more rows than a verification are prompts; for them it is the last row only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..contracts import checked
from . import contracts

# Columns and heads per step. A warp loads 8 heads of the columns at once and sums over heads in registers. The best of
# 45 on an H200, 16 requests of 32k with 32 heads, bf16 scores, 2026-11-22: 0.009 ms (0.012 before).
BLOCK = 256
HEADS_PER_STEP = 8
NUM_WARPS = 1
# Programs wanted in total, about 16 for each of 132 multiprocessors. A program walks along its row, so that short rows
# in a buffer for long contexts do not cost a program for every empty block.
PROGRAMS = 2048
# Positions per step of a program: eight for each of 128 threads, so that the loads of a few shifts are in flight at
# once. Not measured.
DILATE_BLOCK = 1024
DILATE_WARPS = 4
MARK_BLOCK = 128


@triton.jit
def _mass_kernel(
    scores, lse, lens, mass, weight, stride_sr, stride_sh, stride_lr, stride_mr, stride_mg,
    HEADS: tl.constexpr, STEP: tl.constexpr, COMBINE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(1).to(tl.int64)
    r = tl.program_id(2).to(tl.int64)
    length = tl.load(lens + r)
    step = tl.arange(0, STEP)
    blocks = tl.cdiv(length, BLOCK)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        j = block * BLOCK + tl.arange(0, BLOCK)
        inside = j < length
        # If rows consist of whole vectors, whole vectors are read. Elements past the end are computed and dropped.
        readable = (j // 8) * 8 < length if ALIGNED else inside
        new = tl.zeros([BLOCK], tl.float32)
        for i in range(0, HEADS, STEP):
            live = i + step < HEADS
            h = g * HEADS + i + step
            logits = tl.load(
                scores + r * stride_sr + h[:, None] * stride_sh + j[None, :],
                mask=live[:, None] & readable[None, :],
                other=float("-inf"),
            ).to(tl.float32)
            total = tl.load(lse + r * stride_lr + h, mask=live, other=0.0)
            new += tl.sum(tl.exp(logits - total[:, None]), 0)
        new *= weight
        row = mass + r * stride_mr + g * stride_mg
        if COMBINE == "add":
            new += tl.load(row + j, mask=readable, other=0.0)
        # Without a mask the stores are vectors.
        if (block + 1) * BLOCK <= length:
            tl.store(row + j, new)
        else:
            tl.store(row + j, new, mask=inside)


@checked(contracts.accumulate_mass)
def accumulate_mass(scores, lse, lens, mass, weight, combine) -> None:
    rows, query_heads, width = scores.shape
    groups = mass.shape[1]
    if rows == 0 or width == 0:
        return
    heads = query_heads // groups
    programs = min(triton.cdiv(width, BLOCK), max(PROGRAMS // (rows * groups), 1))
    _mass_kernel[(programs, groups, rows)](
        scores, lse, lens, mass, weight, *scores.stride()[:2], lse.stride(0), *mass.stride()[:2],
        HEADS=heads, STEP=min(triton.next_power_of_2(heads), HEADS_PER_STEP), COMBINE=combine, BLOCK=BLOCK,
        ALIGNED=width % 8 == 0, num_warps=NUM_WARPS,
    )  # fmt: skip


@triton.jit
def _dilate_kernel(mass, lens, out, weight, stride_m, stride_o, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    x = tl.program_id(1).to(tl.int64)
    length = tl.load(lens + x)
    row = mass + x * stride_m
    for block in range(tl.program_id(0), tl.cdiv(length, BLOCK), tl.num_programs(0)):
        p = block * BLOCK + tl.arange(0, BLOCK)
        inside = p < length
        top = tl.load(row + p, mask=inside, other=0.0)
        for d in tl.static_range(1, STEPS + 1):
            top = tl.maximum(top, tl.load(row + p - d, mask=inside & (p >= d), other=0.0))
        tl.store(out + x * stride_o + p, top * weight, mask=inside)


@checked(contracts.dilate_mass)
def dilate_mass(mass, lens, out, steps, weight) -> None:
    rows, width = mass.shape
    if rows == 0 or width == 0:
        return
    programs = min(triton.cdiv(width, DILATE_BLOCK), max(PROGRAMS // rows, 1))
    _dilate_kernel[(programs, rows)](
        mass, lens, out, weight, mass.stride(0), out.stride(0), STEPS=steps, BLOCK=DILATE_BLOCK, num_warps=DILATE_WARPS
    )


@triton.jit(do_not_specialize=["rows", "capacity", "max_query_len"])
def _mark_kernel(query_start_loc, seq_lens, scored_rows, lens, rows, capacity, max_query_len, BLOCK: tl.constexpr):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = r < rows
    begin = tl.load(query_start_loc + r, mask=inside, other=0)
    end = tl.load(query_start_loc + r + 1, mask=inside, other=0)
    length = tl.load(seq_lens + r, mask=inside, other=0)
    live = (end > begin) & (length > 0)
    first = tl.where(end - begin > max_query_len, end - 1, begin)
    tl.store(scored_rows + r * 2, tl.where(live, first, -1).to(tl.int64), mask=r < capacity)
    tl.store(scored_rows + r * 2 + 1, tl.where(live, end - 1, -1).to(tl.int64), mask=r < capacity)
    tl.store(lens + r, tl.where(live, length - (end - 1 - first), 0), mask=r < capacity)


@checked(contracts.mark_rows)
def mark_rows(query_start_loc, seq_lens, max_query_len, scored_rows, lens) -> None:
    capacity = lens.shape[0]
    if capacity == 0:
        return
    _mark_kernel[(triton.cdiv(capacity, MARK_BLOCK),)](
        query_start_loc, seq_lens, scored_rows, lens, seq_lens.shape[0], capacity, max_query_len, BLOCK=MARK_BLOCK
    )  # fmt: skip
