"""Estimated logits of a tile of tokens, shared by the kernels that read codes.

Products of 8-bit integers need vectors of 32 elements or more. Field i is code i of each byte. If C >= 32, one field is
such a vector; if C = 16, two fields together are. In other cases codes are unpacked into whole keys. If C is no power
of two, each field has padded(C) columns, and those past C are 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import padding

# PTX handles four bytes at a time; only NVIDIA's compiler supports it, not the interpreter.
FUSED = torch.version.hip is None


def fused(device: torch.device) -> bool:
    """Whether kernels on this device extract fields from four bytes at a time."""
    return FUSED and device.type == "cuda"


@triton.jit
def _query_vectors(packed, first, D: tl.constexpr, C: tl.constexpr, TOGETHER: tl.constexpr, M: tl.constexpr):
    """The query operand for fields first to first + TOGETHER - 1, [TOGETHER * C, M] int8; fields vary fastest."""
    k = tl.arange(0, TOGETHER * padding.padded(C))
    j = k // TOGETHER
    d = (first + k % TOGETHER) * C + j
    return padding.load(packed + tl.arange(0, M)[None, :] * D + d[:, None], (j < C)[:, None], C)


@triton.jit
def elements(D: tl.constexpr, C: tl.constexpr):
    """The elements of a key in the columns of a tile whose fields have padded(C) columns; D where a column has none."""
    column = tl.arange(0, padding.padded(D))
    if padding.padded(C) > C:
        j = column % padding.padded(C)
        column = tl.where(j < C, column // padding.padded(C) * C + j, D)
    return column


@triton.jit
def load_queries(packed, D: tl.constexpr, BITS: tl.constexpr, C: tl.constexpr, M: tl.constexpr):
    """Packed queries [M, D] in four parts for ``tile_products``. Parts that it does not use repeat another part."""
    FIELDS: tl.constexpr = 8 // BITS
    WIDE: tl.constexpr = padding.padded(C)
    if (WIDE >= 32) and (FIELDS <= 4):
        q0 = _query_vectors(packed, 0, D, C, 1, M)
        q1 = _query_vectors(packed, 1, D, C, 1, M)
        q2, q3 = q0, q1
        if FIELDS == 4:
            q2 = _query_vectors(packed, 2, D, C, 1, M)
            q3 = _query_vectors(packed, 3, D, C, 1, M)
    elif (WIDE == 16) and (FIELDS == 4):
        q0 = _query_vectors(packed, 0, D, C, 2, M)
        q1 = _query_vectors(packed, 2, D, C, 2, M)
        q2, q3 = q0, q1
    else:
        d = elements(D, C)
        q0 = padding.load(packed + tl.arange(0, M)[None, :] * D + d[:, None], (d < D)[:, None], D)
        q1, q2, q3 = q0, q0, q0
    return q0, q1, q2, q3


@triton.constexpr_function
def _take(i, bits):
    """PTX that extracts field i of four bytes at a time, while the compiler would handle each byte alone: 2 operations
    instead of about 20. The mask removes bits that the shift moves in from a neighbour."""
    mask = {2: "0x03030303", 4: "0x0F0F0F0F"}[bits]
    return f"{{ .reg .b32 t; shr.b32 t, $1, {i * bits}; and.b32 $0, t, {mask}; }}"


@triton.jit
def _field(byte, i: tl.constexpr, BITS: tl.constexpr, FUSED: tl.constexpr):
    """Field i of each byte, int8, for codes of 2 or 4 bits."""
    if FUSED:
        field = tl.inline_asm_elementwise(_take(i, BITS), "=r,r", [byte], dtype=tl.int8, is_pure=True, pack=4)
    else:
        field = ((byte >> (BITS * i)) & ((1 << BITS) - 1)).to(tl.int8)
    return field


@triton.jit
def _two_fields(byte, i: tl.constexpr, BITS: tl.constexpr, FUSED: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    both = tl.join(_field(byte, i, BITS, FUSED), _field(byte, i + 1, BITS, FUSED))
    return tl.reshape(both, (BLOCK, 2 * C))


@triton.jit
def tile_products(
    byte, q0, q1, q2, q3, D: tl.constexpr, BITS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, FUSED: tl.constexpr
):  # fmt: skip
    """Products [BLOCK, M] int32 of codes, byte [BLOCK, padded(C)] uint8, with rotated queries from ``load_queries``."""
    FIELDS: tl.constexpr = 8 // BITS
    WIDE: tl.constexpr = padding.padded(C)
    if (WIDE >= 32) and (FIELDS <= 4):
        products = tl.dot(_field(byte, 0, BITS, FUSED), q0, out_dtype=tl.int32)
        products = tl.dot(_field(byte, 1, BITS, FUSED), q1, products, out_dtype=tl.int32)
        if FIELDS == 4:
            products = tl.dot(_field(byte, 2, BITS, FUSED), q2, products, out_dtype=tl.int32)
            products = tl.dot(_field(byte, 3, BITS, FUSED), q3, products, out_dtype=tl.int32)
    elif (WIDE == 16) and (FIELDS == 4):
        products = tl.dot(_two_fields(byte, 0, BITS, FUSED, BLOCK, WIDE), q0, out_dtype=tl.int32)
        products = tl.dot(_two_fields(byte, 2, BITS, FUSED, BLOCK, WIDE), q1, products, out_dtype=tl.int32)
    else:
        shift = (tl.arange(0, FIELDS) * BITS).to(tl.uint8)
        field = (byte[:, None, :] >> shift[None, :, None]) & ((1 << BITS) - 1)
        products = tl.dot(tl.reshape(field.to(tl.int8), (BLOCK, FIELDS * WIDE)), q0, out_dtype=tl.int32)
    return products


@triton.jit
def load_blocks(block_table, p, live, BLOCK_SIZE: tl.constexpr):
    """Block ids [BLOCK] int64 of tokens p, from a row of the block table; 0 for tokens that are not live."""
    return tl.load(block_table + p // BLOCK_SIZE, mask=live, other=0).to(tl.int64)


@triton.jit
def load_codes(codes, block, p, live, stride_cb, stride_cn, C: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Codes [BLOCK, padded(C)] uint8 of a head's tokens p in their blocks; zeros for tokens that are not live."""
    where = block * stride_cb + (p % BLOCK_SIZE) * stride_cn
    j = tl.arange(0, padding.padded(C))[None, :]
    return tl.load(codes + where[:, None] + j, mask=padding.both(live[:, None], j < C, C), other=0)


@triton.jit
def load_scales(scales, block, p, live, stride_sb, BLOCK_SIZE: tl.constexpr):
    """Scales [BLOCK] float16 of the same tokens."""
    return tl.load(scales + block * stride_sb + p % BLOCK_SIZE, mask=live, other=0.0)
