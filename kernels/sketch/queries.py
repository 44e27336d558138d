"""Prepares query rows for the scan: rotated, in 8 bits, and with a normaliser that makes scores comparable.

The rows of one KV head are the query tokens of a request times the query heads of the group, tokens outermost: M rows,
q_len * Hq / H of them live. The logit of row m and a token with codes u and scale s is

    x = s (a_m sum_d q_md u_d + b_m)        a_m = 2 w scale    b_m = -(2^bits - 1) w scale sum_d q_md

where q_md is the rotated query in units of w, its largest element / 127. A token's score is the largest x - n_m over
the rows. The normaliser n_m is the logarithm of the row's sum of exp(x), so x - n_m is the logarithm of an attention
weight, and rows with large logits do not outweigh rows with small ones. The sum is estimated from a sample: the first
16 tokens, the last 16 to 31, and blocks of 16 at equal distances between them, about 512 tokens. Each sampled token is
weighted by the number of tokens that it represents. A sum that is no finite number, as with keys that have overflowed,
does not silence its row: n is then 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import padding
from ..contracts import checked
from . import contracts
from .contracts import MAX_SAMPLE, SAMPLE_BLOCK
from .layout import bits_of
from .tiles import fused, load_blocks, load_codes, load_queries, load_scales, tile_products

# H200, 16 requests of 32k, 2026-11-28: 0.0123 ms per layer; with 1,024 sampled tokens 0.0180, with tiles of 128 0.0148.
TILE = 256  # sampled tokens per step
NUM_WARPS = 8
NUM_STAGES = 3


@triton.jit
def _queries_kernel(
    query, query_start_loc, seq_lens, dense, valid_lens, block_table, codes, scales, rotation, packed, factors,
    histogram, scale, norm, dense_up_to, stride_qt, stride_qh, stride_tr, stride_cb, stride_ch, stride_cn, stride_sb,
    stride_sh, stride_fr, stride_pr, stride_hr,
    GROUP: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, C: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
    BINS: tl.constexpr, SAMPLE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    MOST: tl.constexpr, FUSED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0)
    r = tl.program_id(1).to(tl.int64)
    bins = tl.arange(0, BINS)
    tl.store(histogram + r * stride_hr + h * BINS + bins, tl.zeros([BINS], tl.int32))
    begin = tl.load(query_start_loc + r)
    q_len = tl.load(query_start_loc + r + 1) - begin
    context = tl.load(seq_lens + r) - q_len
    if (tl.load(dense + r) != 0) | (context <= dense_up_to) | (q_len <= 0):
        return
    m = tl.arange(0, M)
    d = tl.arange(0, padding.padded(D))
    columns = d < D
    i = m // GROUP
    live = i < tl.minimum(q_len, tl.load(valid_lens + r))
    token = (begin + tl.where(live, i, 0)).to(tl.int64)
    head = h * GROUP + m % GROUP
    where = query + token[:, None] * stride_qt + head[:, None] * stride_qh + d[None, :]
    q = tl.load(where, mask=padding.both(live[:, None], columns[None, :], D), other=0.0)
    turn = padding.load(rotation + d[:, None] * D + d[None, :], columns[:, None] & columns[None, :], D)
    y = tl.dot(q, turn, input_precision="ieee") * norm
    unit = tl.maximum(tl.max(tl.abs(y), 1), 1e-30) / 127.0
    level = tl.floor(y / unit[:, None] + 0.5)
    level = tl.where(level == level, tl.minimum(tl.maximum(level, -127.0), 127.0), 0.0)
    packed += r * stride_pr + h * (M * D)
    padding.store(packed + m[:, None] * D + d[None, :], level.to(tl.int8), columns[None, :], D)
    a = tl.where(live, 2.0 * unit * scale, 0.0)
    b = tl.where(live, -((1 << BITS) - 1.0) * unit * scale * tl.sum(level, 1), 0.0)
    # The stored queries are loaded again, in the order that the products need.
    tl.debug_barrier()
    q0, q1, q2, q3 = load_queries(packed, D, BITS, C, M)
    codes += h * stride_ch
    scales += h * stride_sh
    block_table += r * stride_tr

    stride = tl.maximum((context + MOST - 1) // MOST, 1)  # distance of sampled blocks: at most MOST tokens are sampled
    blocks = (context + SAMPLE - 1) // SAMPLE
    last = tl.maximum(context - SAMPLE, 0) // SAMPLE * SAMPLE  # where the last 16 to 31 tokens begin
    number = (blocks + stride - 1) // stride * SAMPLE + 2 * SAMPLE
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    for start in tl.range(0, number, TILE, num_stages=STAGES):
        j = start + tl.arange(0, TILE)
        # First the last tokens, then every stride-th block, from the first one on.
        strided = (j // SAMPLE - 2) * stride * SAMPLE + j % SAMPLE
        p = tl.where(j < 2 * SAMPLE, last + j, strided)
        inside = (j < number) & (p < context) & ((j < 2 * SAMPLE) | (p < last))
        weight = tl.where((j < 2 * SAMPLE) | (p < SAMPLE), 1.0, stride.to(tl.float32))
        block = load_blocks(block_table, p, inside, BLOCK_SIZE)
        byte = load_codes(codes, block, p, inside, stride_cb, stride_cn, C, BLOCK_SIZE)
        worth = load_scales(scales, block, p, inside, stride_sb, BLOCK_SIZE).to(tl.float32)
        products = tile_products(byte, q0, q1, q2, q3, D, BITS, C, TILE, FUSED)
        x = (products.to(tl.float32) * a[None, :] + b[None, :]) * worth[:, None]
        x = tl.where(inside[:, None], x + tl.log(weight)[:, None], float("-inf"))
        new_top = tl.maximum(top, tl.max(x, 0))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(x - safe[None, :]), 0)
        top = new_top
    n = top + tl.log(total)
    n = tl.where(n - n == 0.0, n, 0.0)  # NaN and infinities
    n = tl.where(live, n, float("inf"))
    factors += r * stride_fr + h * (3 * M)
    tl.store(factors + m, a)
    tl.store(factors + M + m, b)
    tl.store(factors + 2 * M + m, n)


@checked(contracts.prepare_queries)
def prepare_queries(
    query, query_start_loc, seq_lens, dense, valid_lens, block_table, codes, scales, rotation, scale, max_query_len,
    dense_up_to, packed, factors, histogram,
) -> None:  # fmt: skip
    rows, heads, width, size = packed.shape
    group, bits = query.shape[1] // heads, bits_of(codes, size)
    if rows == 0:
        return
    _queries_kernel[(heads, rows)](
        query, query_start_loc, seq_lens, dense, valid_lens, block_table, codes, scales, rotation, packed, factors,
        histogram, scale, size**-0.5, max(dense_up_to, 0), *query.stride()[:2], block_table.stride(0),
        *codes.stride()[:3], *scales.stride()[:2], factors.stride(0), packed.stride(0), histogram.stride(0),
        GROUP=group, D=size, BITS=bits, C=codes.shape[3], M=width, TILE=TILE, BINS=contracts.BINS, SAMPLE=SAMPLE_BLOCK,
        BLOCK_SIZE=codes.shape[2], MOST=MAX_SAMPLE, FUSED=fused(query.device), STAGES=NUM_STAGES, num_warps=NUM_WARPS,
    )  # fmt: skip
