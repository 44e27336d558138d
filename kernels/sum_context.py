"""Sums of the keys and of the values of each request's context, taken further at every step.

    sums[slots[r], h] += sum over p of (key, value) of position p and head h        summed[slots[r], h] <= p < end
    summed[slots[r], h] = end        end = min(lens[r], summed[slots[r], h] + LONGEST)

What a selection leaves out is many tokens of little weight each; their mean stands for them (``add_unread.py``). Every
position is read once in the life of its request, and a step's work is bounded: the first steps after a long prompt take
``LONGEST`` positions each, later ones the few that were accepted.

kv_cache      [B, H, N, 2D]  float; positions from lens on, and those summed before, are not read
block_table   [R, nb]        int32
slots         [R]            int64, distinct where not negative; -1 = padded row: nothing is read or written
lens          [R]            int32; below summed, nothing is done
sums          [Z, H, 2D]     float32; where summed is 0 what it holds is not read
summed        [Z, H]         int32, positions summed so far
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import contracts, unread_contracts

LONGEST = 2048
"""Positions of a request per step. 2048 of head size 128 are a megabyte for each program; not measured."""
BLOCK = 64
NUM_WARPS = 4


@triton.jit
def _sum_kernel(
    kv_cache, block_table, slots, lens, sums, summed,
    stride_cb, stride_ch, stride_cn, stride_br, stride_sz, stride_sh, stride_uz, block_size,
    LONGEST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + r)
    if slot < 0:
        return
    first = tl.load(summed + slot * stride_uz + h)
    end = tl.minimum(tl.load(lens + r), first + LONGEST)
    if end <= first:
        return
    d = tl.arange(0, WIDTH)
    sums += slot * stride_sz + h * stride_sh
    total = tl.load(sums + d, mask=d < tl.where(first > 0, WIDTH, 0), other=0.0)
    for start in range(first, end, BLOCK):
        p = start + tl.arange(0, BLOCK)
        inside = p < end
        block = tl.load(block_table + r * stride_br + p // block_size, mask=inside, other=0).to(tl.int64)
        entry = kv_cache + block * stride_cb + h * stride_ch + (p % block_size).to(tl.int64) * stride_cn
        kv = tl.load(entry[:, None] + d[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
        total += tl.sum(kv, 0)
    tl.store(sums + d, total)
    tl.store(summed + slot * stride_uz + h, end)


def sum_context(
    kv_cache: torch.Tensor, block_table: torch.Tensor, slots: torch.Tensor, lens: torch.Tensor, sums: torch.Tensor,
    summed: torch.Tensor,
) -> None:  # fmt: skip
    """Launch on the current stream, without waiting for the device; arguments as in the module's text."""
    unread_contracts.sum_context(kv_cache, block_table, slots, lens, sums, summed)
    rows, heads, width = slots.shape[0], sums.shape[1], sums.shape[2]
    contracts.head_size(width // 2)
    if rows == 0:
        return
    _sum_kernel[(rows, heads)](
        kv_cache, block_table, slots, lens, sums, summed, *kv_cache.stride()[:3], block_table.stride(0),
        *sums.stride()[:2], summed.stride(0), kv_cache.shape[2], LONGEST=LONGEST, WIDTH=width, BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )  # fmt: skip
