"""The scan: scores each token of the context for the query rows of a step, and makes histograms of the scores.

A token's score is the largest logarithm of its estimated attention weight over the rows of a KV head (``queries``). It
is stored as one of 256 bins, floor((score + 16) * 12.75). So the scan writes one byte for each C + 2 bytes that it
reads, and histograms replace a sort in choosing tokens: one histogram of the context, and one of each chunk of 2,048
tokens. The latter give the start of each chunk's part in the page table.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import triton
import triton.language as tl

from ..contracts import checked
from . import contracts
from .contracts import CHUNK, LOWEST, PER_NAT
from .layout import bits_of
from .tiles import fused, load_blocks, load_codes, load_queries, load_scales, tile_products

logger = logging.getLogger("vllm.specattn")

TILE = 128  # tokens per step
NUM_WARPS = 4
NUM_STAGES = 3
# H200, 16 requests of 32k, 8 KV heads of 128, 24 query rows, 2 bits, 2026-11-28, milliseconds per layer: 0.1225; with
# block ids left to the compiler's pipeline 0.1372; with codes one tile ahead too 0.1508. Tiles of 64 with 2 warps take
# 0.1234, of 256 0.1350, of 32 with 1 warp 0.1832; fewer registers per thread (96, 80, 64) 0.1261 to 0.1654. Memory
# traffic alone would take 0.033: the limits are the other work per score, and waits between the products of a tile.


@triton.jit
def _scores_kernel(
    packed, factors, query_start_loc, seq_lens, dense, block_table, codes, scales, scores, histogram, chunks,
    sink, recent, dense_up_to, lowest, per_nat, stride_pr, stride_fr, stride_tr, stride_cb, stride_ch, stride_sh,
    stride_or, stride_oh, stride_hr, stride_kr, stride_kh, stride_cn, stride_sb,
    D: tl.constexpr, BITS: tl.constexpr, C: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BINS: tl.constexpr, STAGES: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0)
    chunk = tl.program_id(1)
    r = tl.program_id(2).to(tl.int64)
    q_len = tl.load(query_start_loc + r + 1) - tl.load(query_start_loc + r)
    context = tl.load(seq_lens + r) - q_len
    first = chunk * CHUNK
    if (tl.load(dense + r) != 0) | (first >= context) | (context <= dense_up_to) | (q_len <= 0):
        return
    m = tl.arange(0, M)
    packed += r * stride_pr + h * (M * D)
    factors += r * stride_fr + h * (3 * M)
    a = tl.load(factors + m)
    b = tl.load(factors + M + m)
    n = tl.load(factors + 2 * M + m)
    q0, q1, q2, q3 = load_queries(packed, D, BITS, C, M)
    codes += h * stride_ch
    scales += h * stride_sh
    block_table += r * stride_tr
    scores += r * stride_or + h * stride_oh
    end = tl.minimum(first + CHUNK, context)
    # Block ids are loaded two tiles ahead and scales one tile, in loop-carried registers. So the load of codes waits
    # for no other load.
    p = first + tl.arange(0, TILE)
    block = load_blocks(block_table, p, p < end, BLOCK_SIZE)
    next_block = load_blocks(block_table, p + TILE, p + TILE < end, BLOCK_SIZE)
    next_worth = load_scales(scales, block, p, p < end, stride_sb, BLOCK_SIZE)
    for start in tl.range(first, end, TILE, num_stages=STAGES):
        p = start + tl.arange(0, TILE)
        inside = p < end
        byte = load_codes(codes, block, p, inside, stride_cb, stride_cn, C, BLOCK_SIZE)
        worth = next_worth.to(tl.float32)
        block = next_block
        next_worth = load_scales(scales, block, p + TILE, p + TILE < end, stride_sb, BLOCK_SIZE)
        next_block = load_blocks(block_table, p + 2 * TILE, p + 2 * TILE < end, BLOCK_SIZE)
        products = tile_products(byte, q0, q1, q2, q3, D, BITS, C, TILE, FUSED)
        x = (products.to(tl.float32) * a[None, :] + b[None, :]) * worth[:, None] - n[None, :]
        score = tl.max(x, 1)
        bin = tl.minimum(tl.maximum(tl.floor((score - lowest) * per_nat), 0.0), BINS - 1.0)
        bin = tl.where(score == score, bin, BINS - 1.0).to(tl.int32)
        tl.store(scores + p, bin.to(tl.uint8), mask=inside)
    # The stored scores are loaded again, in the order that the histogram needs.
    tl.debug_barrier()
    p = first + tl.arange(0, CHUNK)
    free = (p >= sink) & (p < context - recent)
    counted = tl.load(scores + p, mask=free, other=0).to(tl.int32)
    counts = tl.histogram(counted, BINS, mask=free)
    bins = tl.arange(0, BINS)
    tl.store(chunks + r * stride_kr + h * stride_kh + chunk * BINS + bins, counts.to(tl.int16))
    tl.atomic_add(histogram + r * stride_hr + h * BINS + bins, counts, mask=counts > 0, sem="relaxed")


@functools.cache
def _hopper() -> ModuleType | None:
    """The kernel in Gluon, whose layouts need no barrier in the loop. The interpreter cannot run it. Gluon's names
    still change between versions; if they do not fit, the kernel above does the same, but is slower by a half."""
    try:
        from . import hopper
    except (ImportError, AttributeError) as error:
        logger.warning("the faster scan does not run with Triton %s: %s", triton.__version__, error)
        return None
    return hopper


@checked(contracts.score_tokens)
def score_tokens(
    packed, factors, query_start_loc, seq_lens, dense, block_table, codes, scales, sink, recent, dense_up_to, scores,
    histogram, chunks,
) -> None:  # fmt: skip
    rows, heads, width, size = packed.shape
    bits = bits_of(codes, size)
    if rows == 0:
        return
    grid = (heads, triton.cdiv(scores.shape[2], CHUNK), rows)
    arguments = (
        packed, factors, query_start_loc, seq_lens, dense, block_table, codes, scales, scores, histogram, chunks,
        sink, recent, max(dense_up_to, 0), LOWEST, PER_NAT, packed.stride(0), factors.stride(0), block_table.stride(0),
        *codes.stride()[:2], scales.stride(1), *scores.stride()[:2], histogram.stride(0), *chunks.stride()[:2],
    )  # fmt: skip
    sizes = {"D": size, "BITS": bits, "C": codes.shape[3], "M": width, "CHUNK": CHUNK, "BLOCK_SIZE": codes.shape[2]}
    on_cuda = fused(packed.device)
    if on_cuda and (hopper := _hopper()) and hopper.takes(packed, codes, scales, scores):
        registers = hopper.MAX_REGISTERS if width <= 32 else None
        hopper.scores_kernel[grid](
            *arguments, **sizes, W=hopper.NUM_WARPS, num_warps=hopper.NUM_WARPS, maxnreg=registers
        )
        return
    _scores_kernel[grid](
        *arguments, codes.stride(2), scales.stride(0), **sizes, TILE=TILE, BINS=contracts.BINS, STAGES=NUM_STAGES,
        FUSED=on_cuda, num_warps=NUM_WARPS,
    )  # fmt: skip
