"""Attention mass kept for later: of each request one row, the mean over its score groups, spread forward, in 16 bits.

    out[rows[x], p] = mean_g max_{0 <= d <= steps, d <= p} mass[x, g, p - d]        p < lens[x]

What a request's target attended to in a verification that read everything is one more sign of what it will attend to,
until the next such verification. One row for a layer: kept for each KV head, it would take as much again.

mass    [X, G, L]  float32, nonnegative, the last two dims contiguous; positions from lens on are never read
lens    [X]        int32, at most L; 0 = nothing to keep: rows[x] stays as it is and is not followed
out     [Z, L]     bfloat16, last dim contiguous; other rows, and positions from lens on, stay untouched
rows    [X]        int64, on the device, distinct where lens is above 0
steps   int        on the host, 0 to 64. A row's sum grows at most (steps + 1)-fold
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import contracts

# Not measured; as in ``dilate_mass``, which this is for every group.
BLOCK = 1024
NUM_WARPS = 4
PROGRAMS = 2048


@triton.jit
def _average_kernel(
    mass, lens, out, rows, stride_x, stride_g, stride_o, GROUPS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr
):
    x = tl.program_id(1).to(tl.int64)
    length = tl.load(lens + x)
    if length <= 0:
        return
    out += tl.load(rows + x) * stride_o
    mass += x * stride_x
    for block in range(tl.program_id(0), tl.cdiv(length, BLOCK), tl.num_programs(0)):
        p = block * BLOCK + tl.arange(0, BLOCK)
        inside = p < length
        total = tl.zeros([BLOCK], tl.float32)
        row = mass
        for _ in range(GROUPS):
            top = tl.load(row + p, mask=inside, other=0.0)
            for d in tl.static_range(1, STEPS + 1):
                top = tl.maximum(top, tl.load(row + p - d, mask=inside & (p >= d), other=0.0))
            total += top
            row += stride_g
        tl.store(out + p, (total / GROUPS).to(tl.bfloat16), mask=inside)


def average_mass(mass: torch.Tensor, lens: torch.Tensor, out: torch.Tensor, rows: torch.Tensor, steps: int) -> None:
    """Launch on the current stream, without waiting for the device; arguments as in the module's text."""
    contracts.average_mass(mass, lens, out, rows, steps)
    number, groups, width = mass.shape
    if not mass.numel():
        return
    programs = min(triton.cdiv(width, BLOCK), max(PROGRAMS // number, 1))
    _average_kernel[(programs, number)](
        mass, lens, out, rows, *mass.stride()[:2], out.stride(0), GROUPS=groups, STEPS=steps, BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )  # fmt: skip
