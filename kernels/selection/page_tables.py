"""Page tables of the selected tokens: compaction of bit rows.

    kept positions of (s, r, g): p < seq_lens[r] with p >= prefix_lens[r] or bit p of bits[s, slots[r], g] set
    page(p, g) = block_table[r, p // N] * block + g * head + (p % N) * token        page_strides = (block, head, token)

The cache is read as one long array of pages of one token and one head. The page of a token depends on the cache layout,
which the three strides describe: (N * H, 1, H) if tokens are outermost in a block, (H * N, N, 1) if heads are.
Positions from prefix_len on did not exist when the selection was made, and are always kept.

``build_page_tables``: one table per score group. With G = 1 it holds the pages of head 0, and the reader of head h adds
h * head. With G = H, group g is head g.

Without maps, table (s, r, g) is made from the bits of source s and group g. With both maps it is made from
bits[sources[s], slots[r], groups[s, g]], and its pages are still those of head g. So several layers may share the bits
of a source, and each head of each layer uses one of its groups (Xu et al., arXiv 2605.15508, head map).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..contracts import checked
from . import contracts
from .bit_words import low_bits, popcount

# Positions per program, 16 per thread. With so few, a small number of rows fills the device; with so many, counting the
# bits before the chunk (at most 4 KiB per 32k positions) is a small part of the work. Not yet measured.
CHUNK = 4096
# Words before the chunk that are counted per step.
COUNT_STEP = 1024
NUM_WARPS = 8


@triton.jit
def _kept_words(bits, w, prefix, length):
    """Words w of a row's kept positions: the bits before the prefix, ones from there to the length, then zeros."""
    first = w * 32
    word = tl.load(bits + w, mask=(first < prefix) & (first < length), other=0)
    return (word | ~low_bits(prefix - first)) & low_bits(length - first)


@triton.jit
def _page_table_kernel(
    bits, slots, prefix_lens, seq_lens, block_table, page_table, kept, sources, groups,
    block_size, per_block, per_head, per_token, words, width, heads,
    stride_bs, stride_bn, stride_bg, stride_tr, stride_ps, stride_pr, stride_pg, stride_ks, stride_kr, stride_kg,
    stride_gs, CHUNK: tl.constexpr, COUNT_STEP: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    r = (tl.program_id(1) // heads).to(tl.int64)
    g = (tl.program_id(1) % heads).to(tl.int64)
    s = tl.program_id(2).to(tl.int64)
    slot = tl.load(slots + r)
    length = tl.minimum(tl.load(seq_lens + r), width)
    if slot < 0:
        length = 0
    kept += s * stride_ks + r * stride_kr + g * stride_kg
    if chunk * CHUNK >= length:
        if chunk == 0:
            tl.store(kept, 0)
        return
    prefix = tl.minimum(tl.load(prefix_lens + r), words * 32)
    source, group = s, g
    if sources is not None:
        source = tl.load(sources + s).to(tl.int64)
        group = tl.load(groups + s * stride_gs + g).to(tl.int64)
    bits += source * stride_bs + slot * stride_bn + group * stride_bg

    # Every program itself counts the kept positions before its chunk.
    first_word = chunk * (CHUNK // 32)
    counts = tl.zeros([COUNT_STEP], tl.int32)
    for start in range(0, first_word, COUNT_STEP):
        w = start + tl.arange(0, COUNT_STEP)
        counts += popcount(_kept_words(bits, w, prefix, tl.minimum(length, first_word * 32)))
    before = tl.sum(counts, 0)

    w = first_word + tl.arange(0, CHUNK // 32)
    word = _kept_words(bits, w, prefix, length)
    number = popcount(word)
    word_column = before + tl.cumsum(number, 0) - number
    lane = tl.arange(0, 32)[None, :]
    column = word_column[:, None] + popcount(word[:, None] & low_bits(lane))
    p = w[:, None] * 32 + lane
    keep = ((word[:, None] >> lane) & 1) != 0
    block = tl.load(block_table + r * stride_tr + p // block_size, mask=keep, other=0)
    page = block * per_block + (p % block_size) * per_token + g.to(tl.int32) * per_head
    tl.store(page_table + s * stride_ps + r * stride_pr + g * stride_pg + column, page, mask=keep)
    if chunk == (length - 1) // CHUNK:
        tl.store(kept, before + tl.sum(number, 0))


@checked(contracts.build_page_tables)
def build_page_tables(
    bits, slots, prefix_lens, seq_lens, block_table, block_size, page_strides, page_table, kept, sources=None,
    groups=None,
) -> None:  # fmt: skip
    tables, rows, heads, width = page_table.shape
    if tables == 0 or rows == 0:
        return
    # At least one chunk: the first one also writes the zeros of padded rows.
    _page_table_kernel[(max(triton.cdiv(width, CHUNK), 1), rows * heads, tables)](
        bits, slots, prefix_lens, seq_lens, block_table, page_table, kept,
        sources, groups, block_size, *page_strides, bits.shape[3], width, heads,
        *bits.stride()[:3], block_table.stride(0), *page_table.stride()[:3], *kept.stride(),
        0 if groups is None else groups.stride(0), CHUNK=CHUNK, COUNT_STEP=COUNT_STEP, num_warps=NUM_WARPS,
    )  # fmt: skip
