"""Page tables of the selected tokens: compaction of bit rows into lists of page-size-1 pages.

    kept positions of (s, r, h): p < seq_lens[r] with p >= prefix_lens[r] or bit p of bits[s, slots[r], g] set
    page(p, h) = block_table[r, p // N] * block + h * head + (p % N) * token        page_strides = (block, head, token)

The cache is read as one long array of pages of one token and one head. Which page holds a token depends on the cache
layout, and the three strides say how: (N * H, 1, H) where tokens lie outermost in a block, (H * N, N, 1) where heads
do. Positions from prefix_len on were not there when the selection was made, and are always kept.

bits         [S, num_slots, G, W]  int32, as ``select_top_p`` writes them; G is 1 (all heads alike) or H
slots        [R]                   int64, row of ``bits`` of each request; -1 = padded row: kept = 0, nothing else
prefix_lens  [R]                   int32; -1 = no selection, keep everything. Positions from 32 * W on have no bit, and
                                   are kept as if the prefix ended there
seq_lens     [R]                   int32; 0 = padded row: kept = 0
block_table  [R, nb]               int32; entries past ceil(seq_len / N) are stale and never read
page_table   [S, R, H, width]      int32, width >= max(seq_lens); pages in ascending position; entries past kept are
                                   left untouched, and nothing is ever written past width
kept         [S, R, H]             int32
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import contracts

# One program walks a row, so a step should be long; 2048 positions at 8 warps are 8 a thread.
BLOCK = 2048
NUM_WARPS = 8


@triton.jit
def _page_table_kernel(
    bits, slots, prefix_lens, seq_lens, block_table, page_table, kept,
    block_size, per_block, per_head, per_token, words, width,
    stride_bs, stride_bn, stride_bg, stride_tr, stride_ps, stride_pr, stride_ph, stride_ks, stride_kr, stride_kh,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1).to(tl.int64)
    g = tl.program_id(2).to(tl.int64)
    slot = tl.load(slots + r)
    length = tl.load(seq_lens + r)
    prefix = tl.minimum(tl.load(prefix_lens + r), words * 32)
    if slot < 0:
        length = 0
    bits += s * stride_bs + tl.maximum(slot, 0) * stride_bn + g * stride_bg
    # HEADS heads share the scan of this program: all of them when G is 1, else the one of the group.
    first_head = g * HEADS
    page_table += s * stride_ps + r * stride_pr + first_head * stride_ph

    count = tl.full([], 0, tl.int32)
    for start in range(0, length, BLOCK):
        p = start + tl.arange(0, BLOCK)
        inside = p < length
        selectable = inside & (p < prefix)
        word = tl.load(bits + p // 32, mask=selectable, other=-1)  # all ones: keep
        keep = inside & (((word >> (p % 32)) & 1) != 0)
        column = count + tl.cumsum(keep.to(tl.int32), 0) - 1
        count += tl.sum(keep.to(tl.int32), 0)
        block = tl.load(block_table + r * stride_tr + p // block_size, mask=keep, other=0)
        page = block * per_block + (p % block_size) * per_token
        for i in range(HEADS):
            tl.store(
                page_table + i * stride_ph + column,
                page + (first_head + i).to(tl.int32) * per_head,
                mask=keep & (column < width),
            )
    for i in range(HEADS):
        tl.store(kept + s * stride_ks + r * stride_kr + (first_head + i) * stride_kh, count)


def build_page_tables(
    bits: torch.Tensor, slots: torch.Tensor, prefix_lens: torch.Tensor, seq_lens: torch.Tensor,
    block_table: torch.Tensor, block_size: int, page_strides: tuple[int, int, int], page_table: torch.Tensor,
    kept: torch.Tensor,
) -> None:  # fmt: skip
    """Launch on the current stream, without waiting for the device; arguments as in the module's text."""
    contracts.build_page_tables(
        bits, slots, prefix_lens, seq_lens, block_table, block_size, page_strides, page_table, kept
    )
    sources, _, groups, words = bits.shape
    rows, heads, width = page_table.shape[1:]
    if sources == 0 or rows == 0:
        return
    _page_table_kernel[(sources, rows, groups)](
        bits, slots, prefix_lens, seq_lens, block_table, page_table, kept,
        block_size, *page_strides, words, width,
        *bits.stride()[:3], block_table.stride(0), *page_table.stride()[:3], *kept.stride(),
        HEADS=heads // groups, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
