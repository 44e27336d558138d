"""Makes the page table of a step from scores and cuts: it lists the tokens that each KV head reads."""

from __future__ import annotations

import triton
import triton.language as tl

from ..contracts import checked
from . import contracts
from .contracts import CHUNK

NUM_WARPS = 4


@triton.jit
def _pages_kernel(
    scores, cuts, starts, query_start_loc, seq_lens, block_table, page_table, kept,
    sink, recent, ahead, block_size, per_block, per_head, per_token, longest, width,
    stride_sr, stride_sh, stride_cr, stride_ar, stride_ah, stride_tr, stride_pr, stride_ph, stride_kr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0)
    chunk = tl.program_id(1)
    r = tl.program_id(2).to(tl.int64)
    length = tl.minimum(tl.load(seq_lens + r), longest)
    listed = tl.where(length > 0, tl.minimum(length + ahead, longest), 0)
    kept += r * stride_kr + h
    first = chunk * CHUNK
    if first >= listed:
        if chunk == 0:
            tl.store(kept, 0)
        return
    context = tl.maximum(length - (tl.load(query_start_loc + r + 1) - tl.load(query_start_loc + r)), 0)
    head, tail = tl.minimum(sink, context), tl.maximum(context - recent, 0)
    # Loads without dependencies come first. With threshold -1, scores may be undefined: all are above -1, so all are
    # read.
    p = first + tl.arange(0, CHUNK)
    free = (p >= head) & (p < tail)
    scores += r * stride_sr + h * stride_sh
    score = tl.load(scores + p, mask=free, other=0).to(tl.int32)
    block = tl.load(block_table + r * stride_tr + p // block_size, mask=p < listed, other=0)
    threshold = tl.load(cuts + r * stride_cr + h * 2)
    skip = tl.load(cuts + r * stride_cr + h * 2 + 1)
    before, tied_before = first, 0  # tokens before this chunk: kept ones without ties, and tied ones
    if threshold >= 0:
        starts += r * stride_ar + h * stride_ah
        # ``starts`` covers chunks with a part of the context. For later chunks, add the tokens of the last such chunk.
        last = tl.maximum(context - 1, 0) // CHUNK
        c = tl.minimum(chunk, last)
        tied_before = tl.load(starts + c * 2 + 1)
        forced = tl.minimum(first, head) + tl.maximum(tl.minimum(first, context) - tl.maximum(tail, head), 0)
        before = tl.load(starts + c * 2) + forced + tl.maximum(first - context, 0)
        if chunk > last:
            q = last * CHUNK + tl.arange(0, CHUNK)
            free_there = (q >= head) & (q < tail)
            there = tl.load(scores + q, mask=free_there, other=0).to(tl.int32)
            before += tl.sum((free_there & (there > threshold)).to(tl.int32), 0)
            tied_before += tl.sum((free_there & (there == threshold)).to(tl.int32), 0)
    tie = free & (score == threshold)
    sure = (p < listed) & ((free == 0) | (score > threshold))
    # One sum holds both counts, because neither exceeds the size of a chunk.
    counted = tl.cumsum(sure.to(tl.int32) + (tie.to(tl.int32) << 16), 0)
    rank = tied_before + (counted >> 16)  # counted from 1
    keep = sure | (tie & (rank > skip))
    column = before + (counted & 0xFFFF) + tl.maximum(rank - skip, 0) - 1
    page = block * per_block + (p % block_size) * per_token + h * per_head
    # Even if cuts do not belong to these scores, nothing is written past the table.
    tl.store(page_table + r * stride_pr + h * stride_ph + column, page, mask=keep & (column < width))
    if chunk == (length - 1) // CHUNK:
        last_column = tl.max(tl.where(keep & (p < length), column, -1), 0)
        tl.store(kept, tl.minimum(last_column + 1, width))


@checked(contracts.list_pages)
def list_pages(
    scores, cuts, starts, query_start_loc, seq_lens, block_table, block_size, page_strides, sink, recent, ahead,
    page_table, kept,
) -> None:  # fmt: skip
    rows, heads, width = page_table.shape
    # Positions without an entry in the block table belong to no request.
    longest = min(scores.shape[2], block_table.shape[1] * block_size)
    if rows == 0:
        return
    # At least one chunk: the first one also writes the zeros of padded rows.
    _pages_kernel[(heads, max(triton.cdiv(longest, CHUNK), 1), rows)](
        scores, cuts, starts, query_start_loc, seq_lens, block_table, page_table, kept,
        sink, recent, ahead, block_size, *page_strides, longest, width,
        *scores.stride()[:2], cuts.stride(0), *starts.stride()[:2], block_table.stride(0), *page_table.stride()[:2],
        kept.stride(0), CHUNK=CHUNK, num_warps=NUM_WARPS,
    )  # fmt: skip
