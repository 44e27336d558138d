"""Sums of the keys and of the values of each request's context, taken further while its prompt is computed.

    sums[slots[r], h] += sum over p of (key, value) of position p and head h        summed[slots[r], h] <= p < end
    summed[slots[r], h] = end        end = min(lens[r], summed[slots[r], h] + longest)

What a selection leaves out is many tokens of little weight each; their mean stands for them
(``sparse_attention.py``). Every position is read once in the life of its request: those of a prompt, or found in the
prefix cache, here, by as many programs as it takes; later the few that a verification accepted, by
``sparse_attention`` or ``add_unread``.

kv_cache      [B, H, N, 2D]  float; positions from lens on, and those summed before, are not read
block_table   [R, nb]        int32
slots         [R]            int64, distinct where not negative; -1 = padded row: nothing is read or written
lens          [R]            int32; below summed, nothing is done
sums          [Z, H, 2D]     float32; where summed is 0 what it holds is not read
summed        [Z, H]         int32, positions summed so far
longest       int            on the host, positions of a row that are taken; more than LONGEST also take a buffer of
                             their own, so not where a CUDA graph is captured. Sums do not depend on timing
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import contracts, unread_contracts
from .unread_contracts import LONGEST

BLOCK = 64
NUM_WARPS = 4
# Positions that ``take_further`` takes at a time: a verification has few.
FEW = 16


@triton.jit
def range_sum(kv_cache, table, h, first, end, stride_cb, stride_ch, stride_cn, block_size, WIDTH: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    """[WIDTH]: sum over positions from first up to end of what head h's entries begin with."""
    d = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for start in range(first, end, BLOCK):
        p = start + tl.arange(0, BLOCK)
        inside = p < end
        block = tl.load(table + p // block_size, mask=inside, other=0).to(tl.int64)
        entry = kv_cache + block * stride_cb + h * stride_ch + (p % block_size).to(tl.int64) * stride_cn
        total += tl.sum(tl.load(entry[:, None] + d[None, :], mask=inside[:, None], other=0.0).to(tl.float32), 0)
    return total


@triton.jit
def take_further(
    kv_cache, table, sums, summed, length, h, stride_cb, stride_ch, stride_cn, block_size, D: tl.constexpr,
    BLOCK: tl.constexpr, LONGEST: tl.constexpr,
):  # fmt: skip
    """A row's sums of one head taken further to ``length``, by LONGEST positions at most. Of the programs of a launch,
    exactly one may do so for a row and head.

    Returns what they are then, (keys [D], values [D], positions); of no positions, keys and values are 0.
    """
    d = tl.arange(0, D)
    count = tl.load(summed)
    some = d < tl.where(count > 0, D, 0)
    key, value = tl.load(sums + d, mask=some, other=0.0), tl.load(sums + D + d, mask=some, other=0.0)
    end = tl.minimum(length, count + LONGEST)
    if end > count:
        # Apart, since keys and values are used apart; entries are few, and those of one position lie side by side.
        key += range_sum(
            kv_cache, table, h, count, end, stride_cb, stride_ch, stride_cn, block_size, D, BLOCK
        )  # fmt: skip
        value += range_sum(
            kv_cache + D, table, h, count, end, stride_cb, stride_ch, stride_cn, block_size, D, BLOCK
        )  # fmt: skip
        # Every warp has read the sums before any writes them.
        tl.debug_barrier()
        tl.store(sums + d, key)
        tl.store(sums + D + d, value)
        tl.store(summed, end)
        count = end
    return key, value, count


# Compiled once, not anew for lengths that happen to be multiples of 16.
@triton.jit(do_not_specialize=["longest"])
def _sum_kernel(
    kv_cache, block_table, slots, lens, sums, summed, parts,
    stride_cb, stride_ch, stride_cn, stride_br, stride_sz, stride_sh, stride_uz, block_size, longest,
    LONGEST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    r, h, s = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    slot = tl.load(slots + r)
    if slot < 0:
        return
    first = tl.load(summed + slot * stride_uz + h)
    end = tl.minimum(tl.load(lens + r), first + longest)
    begin = first + s * LONGEST
    if end <= begin:
        return
    stop = tl.minimum(end, begin + LONGEST)
    total = range_sum(
        kv_cache, block_table + r * stride_br, h, begin, stop, stride_cb, stride_ch, stride_cn, block_size, WIDTH, BLOCK
    )
    d = tl.arange(0, WIDTH)
    if ALONE:
        sums += slot * stride_sz + h * stride_sh
        total += tl.load(sums + d, mask=d < tl.where(first > 0, WIDTH, 0), other=0.0)
        tl.store(sums + d, total)
        tl.store(summed + slot * stride_uz + h, end)
    else:
        part = (r * tl.num_programs(1) + h) * tl.num_programs(2) + s
        tl.store(parts + part * WIDTH + d, total)


@triton.jit(do_not_specialize=["longest", "number"])
def _add_parts_kernel(
    slots, lens, sums, summed, parts, number, stride_sz, stride_sh, stride_uz, longest,
    LONGEST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    r, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + r)
    if slot < 0:
        return
    first = tl.load(summed + slot * stride_uz + h)
    end = tl.minimum(tl.load(lens + r), first + longest)
    if end <= first:
        return
    d = tl.arange(0, WIDTH)
    sums += slot * stride_sz + h * stride_sh
    parts += (r * tl.num_programs(1) + h) * number * WIDTH
    total = tl.load(sums + d, mask=d < tl.where(first > 0, WIDTH, 0), other=0.0)
    for s in range(0, tl.cdiv(end - first, LONGEST)):
        total += tl.load(parts + s * WIDTH + d)
    tl.store(sums + d, total)
    tl.store(summed + slot * stride_uz + h, end)


def sum_context(
    kv_cache: torch.Tensor, block_table: torch.Tensor, slots: torch.Tensor, lens: torch.Tensor, sums: torch.Tensor,
    summed: torch.Tensor, longest: int = LONGEST,
) -> None:  # fmt: skip
    """Launch on the current stream, without waiting for the device; arguments as in the module's text."""
    unread_contracts.sum_context(kv_cache, block_table, slots, lens, sums, summed, longest)
    rows, heads, width = slots.shape[0], sums.shape[1], sums.shape[2]
    contracts.head_size(width // 2)
    if rows == 0:
        return
    number = triton.cdiv(longest, LONGEST)
    parts = sums if number == 1 else sums.new_empty((rows, heads, number, width))
    _sum_kernel[(rows, heads, number)](
        kv_cache, block_table, slots, lens, sums, summed, parts, *kv_cache.stride()[:3], block_table.stride(0),
        *sums.stride()[:2], summed.stride(0), kv_cache.shape[2], longest, LONGEST=LONGEST, WIDTH=width, BLOCK=BLOCK,
        ALONE=number == 1, num_warps=NUM_WARPS,
    )  # fmt: skip
    if number > 1:
        _add_parts_kernel[(rows, heads)](
            slots, lens, sums, summed, parts, number, *sums.stride()[:2], summed.stride(0), longest,
            LONGEST=LONGEST, WIDTH=width, num_warps=1,
        )  # fmt: skip
