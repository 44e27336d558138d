"""Attention mass of each position, summed over the query heads of a score group.

    new[r, g, p] = weight * sum_{h in group g} exp(scores[r, h, p] - lse[r, h])        p < lens[r]
    mass[r, g, p] = new                       combine "store"
                  = mass[r, g, p] + new       combine "add"

With weight = G / Hq the mass of a row sums to at most 1 after "store"; the caller scales so that it still does after
further calls, because ``select_top_p`` counts on it.

scores     [R, Hq, L]  float32 or bfloat16, scaled logits as ``draft_attention`` stores them; with two scored
                       rows, its 2 * Hq rows are Hq here, those of a KV head still consecutive
lse        [R, Hq]     float32, natural logarithm, finite wherever lens > 0
lens       [R]         int32, at most the seq_len the scores were made for; 0 = padded row, which stays untouched
mass       [R, G, L]   float32, in and out; G divides Hq, and the heads of a group are consecutive; positions from lens
                       on are left untouched
weight     float       on the host

Indexed, if both of these are given (combine is "add" then): column j of ``scores`` belongs to position
positions[r, j] for j < kept[r]; further columns are not counted, and positions that are not listed, or not below lens,
keep their mass. kept[r] = -1: the columns of row r are positions, as without a list.

positions  [R, W]      int32, ascending
kept       [R]         int32, at most W and L

Shifted, if ``shift`` is more than 0 (combine is "add" then): what belongs to position p goes to p + shift
instead, if that is below lens. Heads that copy move on by a token a step, so this is what they will attend to next.

shift      int         on the host, 0 to 64
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import contracts

# Columns and heads per step; a warp loads 8 heads of them at once and sums over heads in registers. The best of 45 on
# an H200, 16 requests of 32k with 32 heads, bf16 scores, 2026-11-22: 0.009 ms (0.012 before); through a list of a
# tenth, where there is less to share out, 0.005 ms (0.009 before).
BLOCK = 256
INDEXED_BLOCK = 64
HEADS_PER_STEP = 8
NUM_WARPS = 1
# Programs wanted in all, about 16 for each of 132 multiprocessors. A program walks along its row, so that a buffer for
# long contexts does not cost a program per block behind the end of every short row.
PROGRAMS = 2048


@triton.jit
def _mass_kernel(
    scores, lse, lens, mass, positions, kept, weight,
    stride_sr, stride_sh, stride_lr, stride_mr, stride_mg, stride_pr,
    HEADS: tl.constexpr, STEP: tl.constexpr, COMBINE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
    INDEXED: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(1).to(tl.int64)
    r = tl.program_id(2).to(tl.int64)
    length = tl.load(lens + r)
    columns = length
    listed = 0
    if INDEXED:
        count = tl.load(kept + r)
        # Distinct ascending positions: no more than ``length`` of them are below it.
        listed = tl.minimum(tl.maximum(count, 0), length)
        columns = tl.where(count >= 0, listed, length)
    step = tl.arange(0, STEP)
    blocks = tl.cdiv(columns, BLOCK)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        j = block * BLOCK + tl.arange(0, BLOCK)
        inside = j < columns
        # Rows of whole vectors are read in whole vectors: what lies behind the end is computed and then dropped.
        readable = (j // 8) * 8 < columns if ALIGNED else inside
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
        if INDEXED or SHIFT:
            p = j
            if INDEXED:
                p = tl.where(j < listed, tl.load(positions + r * stride_pr + j, mask=j < listed, other=0), j)
            p += SHIFT
            inside = inside & (p < length)
            old = tl.load(row + p, mask=inside, other=0.0)
            tl.store(row + p, old + new, mask=inside)
        else:
            if COMBINE == "add":
                new += tl.load(row + j, mask=readable, other=0.0)
            # Without a mask the stores are vectors.
            if (block + 1) * BLOCK <= columns:
                tl.store(row + j, new)
            else:
                tl.store(row + j, new, mask=inside)


def accumulate_mass(
    scores: torch.Tensor, lse: torch.Tensor, lens: torch.Tensor, mass: torch.Tensor, weight: float, combine: str,
    positions: torch.Tensor | None = None, kept: torch.Tensor | None = None, shift: int = 0,
) -> None:  # fmt: skip
    """Launch on the current stream, without waiting for the device; arguments as in the module's text."""
    contracts.accumulate_mass(scores, lse, lens, mass, combine, positions, kept, shift)
    rows, query_heads, width = scores.shape
    groups = mass.shape[1]
    if rows == 0 or width == 0:
        return
    heads = query_heads // groups
    indexed = positions is not None
    block = INDEXED_BLOCK if indexed else BLOCK
    programs = min(triton.cdiv(width, block), max(PROGRAMS // (rows * groups), 1))
    _mass_kernel[(programs, groups, rows)](
        scores, lse, lens, mass, positions if indexed else lens, kept if indexed else lens, weight,
        *scores.stride()[:2], lse.stride(0), *mass.stride()[:2], positions.stride(0) if indexed else 0,
        HEADS=heads, STEP=min(triton.next_power_of_2(heads), HEADS_PER_STEP), COMBINE=combine, BLOCK=block,
        ALIGNED=width % 8 == 0, INDEXED=indexed, SHIFT=shift, num_warps=NUM_WARPS,
    )  # fmt: skip
