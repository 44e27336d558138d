"""Attention mass of each position, summed over the query heads of a score group.

    new[r, g, p] = weight * sum_{h in group g} exp(scores[r, h, p] - lse[r, h])        p < lens[r]
    mass[r, g, p] = new                       combine "store"
                  = mass[r, g, p] + new       combine "add"
                  = max(mass[r, g, p], new)   combine "max"

With weight = G / Hq the mass of a row sums to at most 1 after "store"; the caller scales so that it still does after
further calls, because ``select_top_p`` counts on it.

scores  [R, Hq, L]  float32 or bfloat16, scaled logits as ``decode_attention`` stores them
lse     [R, Hq]     float32, natural logarithm, finite wherever lens > 0
lens    [R]         int32, at most the seq_len the scores were made for; 0 = padded row, nothing is read or written
mass    [R, G, L]   float32, in and out; G divides Hq, and the heads of a group are consecutive; positions from lens
                    on are left untouched
weight  float       on the host
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import contracts

# Four 16-byte loads per thread and head: enough to cover the latency, and few idle programs behind short rows.
BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def _mass_kernel(
    scores, lse, lens, mass, weight, stride_sr, stride_sh, stride_lr, stride_mr, stride_mg,
    HEADS: tl.constexpr, COMBINE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1).to(tl.int64)
    p = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    length = tl.load(lens + r)
    if tl.program_id(2) * BLOCK >= length:
        return
    inside = p < length
    new = tl.zeros([BLOCK], tl.float32)
    for i in range(HEADS):
        h = g * HEADS + i
        logits = tl.load(scores + r * stride_sr + h * stride_sh + p, mask=inside, other=0.0).to(tl.float32)
        new += tl.exp(logits - tl.load(lse + r * stride_lr + h))
    new *= weight
    where = mass + r * stride_mr + g * stride_mg + p
    if COMBINE == "add":
        new += tl.load(where, mask=inside, other=0.0)
    elif COMBINE == "max":
        new = tl.maximum(new, tl.load(where, mask=inside, other=0.0))
    tl.store(where, new, mask=inside)


def accumulate_mass(
    scores: torch.Tensor, lse: torch.Tensor, lens: torch.Tensor, mass: torch.Tensor, weight: float, combine: str
) -> None:
    """Launch on the current stream, without waiting for the device; arguments as in the module's text."""
    contracts.accumulate_mass(scores, lse, lens, mass, combine)
    rows, query_heads, width = scores.shape
    groups = mass.shape[1]
    if rows == 0 or width == 0:
        return
    _mass_kernel[(rows, groups, triton.cdiv(width, BLOCK))](
        scores, lse, lens, mass, weight, *scores.stride()[:2], lse.stride(0), *mass.stride()[:2],
        HEADS=query_heads // groups, COMBINE=combine, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
