"""Spreads attention mass forward: each position gets the largest mass of itself and of the few positions before it.

    out[x, p] = weight * max_{0 <= d <= steps, d <= p} mass[x, p - d]        p < lens[x]

A selection made from past attention can miss the tokens to which the next tokens attend: heads that copy text move on
by one position per token. If mass is spread by as many steps as tokens follow, it covers these positions.

mass    [X, L]  float32, nonnegative; positions from lens on are never read
lens    [X]     int32, at most L; 0 = padded row, which stays untouched
out     [X, L]  float32, must not share memory with ``mass``; positions from lens on stay untouched
steps   int     on the host, 0 to 64: every step reads the row once more, mostly from the L1 cache
weight  float   on the host, positive. A maximum over steps + 1 positions is at most their sum, so the row's sum grows
                at most (steps + 1)-fold. With a weight of 1 / (steps + 1) or less, sums of at most 1 stay at most 1;
                ``select_top_p`` requires this (its sums must stay below 2)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import contracts

# Positions per step of a program: eight for each of 128 threads, so that the loads of a few shifts are in flight at
# once. Not measured.
BLOCK = 1024
NUM_WARPS = 4
# Programs wanted in total, about 16 for each of 132 multiprocessors, as in ``accumulate_mass``.
PROGRAMS = 2048


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


def dilate_mass(mass: torch.Tensor, lens: torch.Tensor, out: torch.Tensor, steps: int, weight: float) -> None:
    """Launch on the current stream, without waiting for the device; arguments as in the module's text."""
    contracts.dilate_mass(mass, lens, out, steps, weight)
    rows, width = mass.shape
    if rows == 0 or width == 0:
        return
    programs = min(triton.cdiv(width, BLOCK), max(PROGRAMS // rows, 1))
    _dilate_kernel[(programs, rows)](
        mass, lens, out, weight, mass.stride(0), out.stride(0), STEPS=steps, BLOCK=BLOCK, num_warps=NUM_WARPS
    )
