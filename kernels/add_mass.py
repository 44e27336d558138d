"""Two kinds of attention mass for one choice: what the draft attends to, and what is remembered of the target.

    out[x, p] = mass[rows[x], p] + weight * other[other_rows[x], p]        p < lens[x]

mass        [Y, L]  float32; read at p < lens[x]
lens        [X]     int32, at most L; 0 = padded row: nothing is followed, read or written
out         [X, L]  float32, no memory shared with ``mass``; positions from lens on stay untouched
rows        [X]     int64, on the device: which row of the mass
other       [Z, L]  bfloat16; read at p < other_lens[x], 0 from there on
other_rows  [X]     int64, on the device; not followed where other_lens is 0
other_lens  [X]     int32, at most L
weight      float   on the host, nonnegative. ``select_top_p`` counts on a row's sum below 2
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import contracts

# Not measured; as in ``dilate_mass``.
BLOCK = 1024
NUM_WARPS = 4
PROGRAMS = 2048


@triton.jit
def _add_kernel(
    mass, lens, out, rows, other, other_rows, other_lens, weight, stride_m, stride_o, stride_t, BLOCK: tl.constexpr
):
    x = tl.program_id(1).to(tl.int64)
    length = tl.load(lens + x)
    if length <= 0:
        return
    mass += tl.load(rows + x) * stride_m
    remembered = tl.load(other_lens + x)
    other += tl.where(remembered > 0, tl.load(other_rows + x), 0) * stride_t
    out += x * stride_o
    for block in range(tl.program_id(0), tl.cdiv(length, BLOCK), tl.num_programs(0)):
        p = block * BLOCK + tl.arange(0, BLOCK)
        inside = p < length
        more = tl.load(other + p, mask=inside & (p < remembered), other=0.0).to(tl.float32)
        tl.store(out + p, tl.load(mass + p, mask=inside, other=0.0) + weight * more, mask=inside)


def add_mass(
    mass: torch.Tensor, lens: torch.Tensor, out: torch.Tensor, rows: torch.Tensor, other: torch.Tensor,
    other_rows: torch.Tensor, other_lens: torch.Tensor, weight: float,
) -> None:  # fmt: skip
    """Launch on the current stream, without waiting for the device; arguments as in the module's text."""
    contracts.add_mass(mass, lens, out, rows, other, other_rows, other_lens, weight)
    number, width = out.shape
    if not out.numel():
        return
    programs = min(triton.cdiv(width, BLOCK), max(PROGRAMS // number, 1))
    _add_kernel[(programs, number)](
        mass, lens, out, rows, other, other_rows, other_lens, weight,
        mass.stride(0), out.stride(0), other.stride(0), BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
