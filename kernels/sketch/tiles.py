"""Estimated logits of a tile of tokens: what the kernels that read codes share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def query_field(packed, i, D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr):
    """Elements i * WIDTH and on of every row of packed [M, D], as [WIDTH, M] int8."""
    return tl.load(packed + tl.arange(0, M)[None, :] * D + (i * WIDTH + tl.arange(0, WIDTH))[:, None])


@triton.jit
def load_queries(packed, D: tl.constexpr, BITS: tl.constexpr, C: tl.constexpr, M: tl.constexpr):
    """Packed queries [M, D] in four parts, as ``tile_products`` wants them; parts that it does not want repeat one."""
    FIELDS: tl.constexpr = 8 // BITS
    if (C >= 32) and (FIELDS <= 4):
        q0 = query_field(packed, 0, D, C, M)
        q1 = query_field(packed, 1, D, C, M)
        q2, q3 = q0, q1
        if FIELDS == 4:
            q2 = query_field(packed, 2, D, C, M)
            q3 = query_field(packed, 3, D, C, M)
    else:
        q0 = query_field(packed, 0, D, D, M)
        q1, q2, q3 = q0, q0, q0
    return q0, q1, q2, q3


@triton.jit
def _field(byte, i: tl.constexpr, BITS: tl.constexpr):
    return ((byte >> (BITS * i)) & ((1 << BITS) - 1)).to(tl.int8)


@triton.jit
def tile_products(byte, q0, q1, q2, q3, D: tl.constexpr, BITS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
                  M: tl.constexpr):  # fmt: skip
    """Products [BLOCK, M] int32 of codes, byte [BLOCK, C] uint8, with rotated queries.

    Where a byte's fields make vectors that are long enough for a product, each is a product of its own: a field is then
    a shift and a mask, and nothing moves between threads.
    """
    FIELDS: tl.constexpr = 8 // BITS
    if (C >= 32) and (FIELDS <= 4):
        products = tl.dot(_field(byte, 0, BITS), q0)
        products = tl.dot(_field(byte, 1, BITS), q1, products)
        if FIELDS == 4:
            products = tl.dot(_field(byte, 2, BITS), q2, products)
            products = tl.dot(_field(byte, 3, BITS), q3, products)
    else:
        shift = (tl.arange(0, FIELDS) * BITS).to(tl.uint8)
        field = (byte[:, None, :] >> shift[None, :, None]) & ((1 << BITS) - 1)
        products = tl.dot(tl.reshape(field.to(tl.int8), (BLOCK, D)), q0)
    return products


@triton.jit
def load_codes(codes, scales, block_table, p, live, block_size, stride_cb, stride_cn, stride_sb, C: tl.constexpr):
    """Codes [BLOCK, C] uint8 and scales [BLOCK] float32 of a head's tokens p [BLOCK], through a row of the block
    table; zeros for those that are not live."""
    block = tl.load(block_table + p // block_size, mask=live, other=0).to(tl.int64)
    offset = p % block_size
    where = block * stride_cb + offset * stride_cn
    byte = tl.load(codes + where[:, None] + tl.arange(0, C)[None, :], mask=live[:, None], other=0)
    return byte, tl.load(scales + block * stride_sb + offset, mask=live, other=0.0).to(tl.float32)
