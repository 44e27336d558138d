"""Block tables of the selected tokens, for executors that read whole blocks of vLLM's cache.

``build_block_tables`` has the signature of ``build_page_tables``, and does the same for whole blocks:

    kept blocks b of (s, r):  some position p of b, p < seq_lens[r], has p >= prefix_lens[r] or its bit set
    page_table[s, r, 0]       their ids block_table[r, b], ascending in b
    kept[s, r, 0]             number of TOKENS in these blocks: N in each, but (seq_len - 1) % N + 1 in the sequence's
                              last block, if it is kept

If there is a new token (prefix_len < seq_len), the sequence's last block is kept and comes last. So the new tokens are
the last entries, in order, and causal masking needs no positions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..contracts import checked
from . import contracts
from .bit_words import low_bits

# Blocks that one program compacts. Each program also counts the kept blocks before its own, COUNT_BLOCKS per step. Bits
# are few (4 KiB for 32k tokens), so counting them again is cheaper than a second launch. Not yet measured.
CHUNK = 512
COUNT_BLOCKS = 2048
NUM_WARPS = 4


@triton.jit
def _kept_blocks(bits, b, blocks, length, prefix, BLOCK_SIZE: tl.constexpr, WORDS: tl.constexpr):
    """Which of the blocks b are kept; none from ``blocks`` on. prefix is at most 32 * W, blocks = ceil(length / N)."""
    first = b * BLOCK_SIZE
    end = tl.minimum(first + BLOCK_SIZE, length)
    keep = (b < blocks) & (end > prefix)
    # All other blocks end within the prefix, so each of their positions has a bit.
    selectable = (b < blocks) & (end <= prefix)
    for i in tl.static_range(WORDS):
        w = first // 32 + i
        inside = selectable & (w * 32 < end)
        word = tl.load(bits + w, mask=inside, other=0)
        mine = low_bits(end - w * 32) & ~low_bits(first - w * 32)
        keep |= inside & ((word & mine) != 0)
    return keep


@triton.jit
def _block_table_kernel(
    bits, slots, prefix_lens, seq_lens, block_table, page_table, kept, words, width,
    stride_bs, stride_bn, stride_tr, stride_ps, stride_pr, stride_ks, stride_kr,
    BLOCK_SIZE: tl.constexpr, WORDS: tl.constexpr, CHUNK: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    r = tl.program_id(1).to(tl.int64)
    s = tl.program_id(2).to(tl.int64)
    slot = tl.load(slots + r)
    length = tl.maximum(tl.load(seq_lens + r), 0)
    length = tl.where(slot < 0, 0, length)
    blocks = tl.cdiv(length, BLOCK_SIZE)
    begin = chunk * CHUNK
    kept += s * stride_ks + r * stride_kr
    tl.store(kept, 0, mask=(chunk == 0) & (blocks == 0))
    if begin >= blocks:
        return
    prefix = tl.minimum(tl.load(prefix_lens + r), words * 32)
    bits += s * stride_bs + slot * stride_bn

    before = tl.zeros([COUNT], tl.int32)
    for start in range(0, begin, COUNT):
        b = start + tl.arange(0, COUNT)
        before += _kept_blocks(bits, b, begin, length, prefix, BLOCK_SIZE, WORDS).to(tl.int32)
    count = tl.sum(before, 0)

    b = begin + tl.arange(0, CHUNK)
    keep = _kept_blocks(bits, b, blocks, length, prefix, BLOCK_SIZE, WORDS)
    column = count + tl.cumsum(keep.to(tl.int32), 0) - 1
    block = tl.load(block_table + r * stride_tr + b, mask=keep, other=0)
    tl.store(page_table + s * stride_ps + r * stride_pr + column, block, mask=keep & (column < width))
    # The program of the last block knows the total.
    count += tl.sum(keep.to(tl.int32), 0)
    last = tl.sum((keep & (b == blocks - 1)).to(tl.int32), 0)
    tokens = count * BLOCK_SIZE - last * (blocks * BLOCK_SIZE - length)
    tl.store(kept, tokens, mask=begin + CHUNK >= blocks)


@checked(contracts.build_block_tables)
def build_block_tables(
    bits, slots, prefix_lens, seq_lens, block_table, block_size, page_strides, page_table, kept, sources=None,
    groups=None,
) -> None:  # fmt: skip
    tables, rows, _, width = page_table.shape
    words = bits.shape[3]
    if tables == 0 or rows == 0:
        return
    chunks = max(1, triton.cdiv(block_table.shape[1], CHUNK))
    # Most words that a block can span. A block may start anywhere in a word, unless its size divides 32 or is a
    # multiple of 32.
    spanned = max(1, block_size // 32) if 32 % block_size == 0 or block_size % 32 == 0 else (block_size + 30) // 32 + 1
    _block_table_kernel[(chunks, rows, tables)](
        bits, slots, prefix_lens, seq_lens, block_table, page_table, kept, words, width,
        *bits.stride()[:2], block_table.stride(0), *page_table.stride()[:2], *kept.stride()[:2],
        BLOCK_SIZE=block_size, WORDS=spanned, CHUNK=CHUNK, COUNT=COUNT_BLOCKS, num_warps=NUM_WARPS,
    )  # fmt: skip
