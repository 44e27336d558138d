"""Attention mass of each position, summed over the query heads of a score group.

    new[r, g, p] = weight * sum_{h in group g} exp(scores[r, h, p] - lse[r, h])        p < lens[r]
    mass[r, g, p] = new                       combine "store"
                  = mass[r, g, p] + new       combine "add"

With weight = G / Hq the mass of a row sums to at most 1 after "store". A caller that makes further calls must choose a
smaller weight so that this still holds, because ``select_top_p`` requires it.

scores     [R, Hq, L]  float32 or bfloat16, scaled logits as ``draft_attention`` stores them; with two scored
                       rows, Hq here is twice the number of query heads, and the rows of a KV head are consecutive
lse        [R, Hq]     float32, natural logarithm, finite wherever lens > 0
lens       [R]         int32, at most the seq_len of the scores; 0 = padded row, which stays untouched
mass       [R, G, L]   float32, in and out; G divides Hq, and the heads of a group are consecutive; positions from lens
                       on stay untouched
weight     float       on the host
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import contracts

# Columns and heads per step. A warp loads 8 heads of the columns at once and sums over heads in registers. The best of
# 45 on an H200, 16 requests of 32k with 32 heads, bf16 scores, 2026-11-22: 0.009 ms (0.012 before).
BLOCK = 256
HEADS_PER_STEP = 8
NUM_WARPS = 1
# Programs wanted in total, about 16 for each of 132 multiprocessors. A program walks along its row, so that short rows
# in a buffer for long contexts do not cost a program for every empty block.
PROGRAMS = 2048


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


def accumulate_mass(
    scores: torch.Tensor, lse: torch.Tensor, lens: torch.Tensor, mass: torch.Tensor, weight: float, combine: str
) -> None:  # fmt: skip
    """Launch on the current stream, without waiting for the device; arguments as in the module's text."""
    contracts.accumulate_mass(scores, lse, lens, mass, combine)
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
