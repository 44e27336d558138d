"""A tile of tokens in the scan for GPUs of compute capability 9.0, in Gluon, where layouts are explicit.

Codes go from memory directly into the operand registers of the product, and scores from its result to memory. No tile
passes through shared memory, and warps do not wait for each other. For that, elements and tokens are in an order that
suits the loads. This is allowed, because neither the sum of a product nor the scan of tokens depends on the order.

A tile has 32 W tokens for W warps. Lane 4 g + t of warp w loads quarter t of the codes of four tokens, 32 w + 4 g to
32 w + 4 g + 3. So an array of codes is [w, g, half of four, token of two, quarter t, word, byte]. The operand of the
product needs the same bytes at row (half of four, w, token of two, g) and element (word, t, byte). Queries are loaded
in the same order. C is the number of bytes of a token's codes. Query rows are processed in N groups of 8.
"""

# ruff: noqa: RUF005 (the compiler does not take (*a, b))

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

# The accumulator of products starts with the bits of 1.5 * 2^23. Read as a float32, it is then that number plus the
# product, so a subtraction converts it to a float, which is cheaper than an integer conversion.
START = gl.constexpr(0x4B400000)
START_FLOAT = gl.constexpr(12582912.0)


@triton.constexpr_function
def weight(bits):
    """The factor of a field at its position in the byte after ``_take``; with 2 bits, a field is in bits 4 and 5. Left
    shifts cost less than right shifts."""
    return {1: 64, 2: 16, 4: 1}[bits]


@triton.constexpr_function
def _take(i, bits):
    """PTX that extracts field i of four bytes. The mask removes bits that the shift moves in from a neighbour."""
    mask = {1: "0x40404040", 2: "0x30303030", 4: "0x0F0F0F0F"}[bits]
    shift = i * bits - {1: 6, 2: 4, 4: 0}[bits]
    move = "shr.b32" if shift > 0 else "shl.b32"
    return f"{{ .reg .b32 t; {move} t, $1, {abs(shift)}; and.b32 $0, t, {mask}; }}"


@triton.constexpr_function
def layout(shape, registers, lanes, warps):
    """A layout from the dimensions along which registers, lanes and warps count, the fastest first: (dimension, step,
    number), powers of 2; dimension -1: all hold the same."""

    def bases(counted):
        return [
            [step << i if axis == dim else 0 for axis in range(len(shape))]
            for dim, step, number in counted
            for i in range(number.bit_length() - 1)
        ]

    return gl.DistributedLinearLayout(bases(registers), bases(lanes), bases(warps), [], shape)


@gluon.jit
def as_bytes(word):
    """Words [...] int32 -> their bytes [..., 2, 2] int8."""
    return gl.join(
        gl.join(word.to(gl.int8), (word >> 16).to(gl.int8)), gl.join((word >> 8).to(gl.int8), (word >> 24).to(gl.int8))
    )


@gluon.jit
def _field(word, i: gl.constexpr, BITS: gl.constexpr, C: gl.constexpr, W: gl.constexpr):
    """Field i of codes, word [8 W, 4, C / 4] int32 -> [32 W, C] int8, in the order of the product's operand."""
    field = gl.inline_asm_elementwise(_take(i, BITS), "=r,r", [word], dtype=gl.int32, is_pure=True, pack=1)
    field = gl.reshape(as_bytes(field), (W, 8, 2, 2, 4, C // 16, 4))
    return gl.reshape(gl.permute(field, (2, 0, 3, 1, 5, 4, 6)), (32 * W, C))


@gluon.jit
def find_blocks(table, p, last, BLOCK_SIZE: gl.constexpr):
    """Block ids of tokens p, uint32; tokens beyond the end get the block at index ``last``."""
    return gl.load(table + gl.minimum(p.to(gl.uint32) // BLOCK_SIZE, last)).to(gl.uint32, bitcast=True)


@gluon.jit
def load_tile(code_at, scale_at, block, stride, C: gl.constexpr, CODES: gl.constexpr):
    """Codes [8 W, 4, C / 4] int32 and scales [8 W, 4] float16 of four tokens in each of the blocks [8 W]. code_at,
    scale_at: byte pointers to the first of the four tokens, as if in block 0; stride: bytes from block to block."""
    first = block.to(gl.uint64) * stride
    token = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, CODES)))[None, :]
    code = code_at + first[:, None, None] + gl.expand_dims(token, 2) * C
    scale = scale_at + first[:, None] + token * 2
    # The compiler cannot see through byte pointers that the part of a lane is contiguous.
    code = gl.max_contiguous(code.to(gl.pointer_type(gl.int32), bitcast=True), [1, 1, C // 16])
    scale = gl.max_contiguous(scale.to(gl.pointer_type(gl.float16), bitcast=True), [1, 4])
    return gl.load(gl.multiple_of(code, [1, 1, C // 4])), gl.load(gl.multiple_of(scale, [1, 8]))


@gluon.jit
def load_query(packed, D: gl.constexpr, C: gl.constexpr, W: gl.constexpr, OPERAND: gl.constexpr):
    """The query operand of one product, for 8 rows: [max(C, 32), 8] int8. If C is 16, two fields form one product."""
    H: gl.constexpr = C // 16 if C > 16 else 2
    L: gl.constexpr = layout((8, H, 4, 4), ((3, 1, 4), (1, 1, H)), ((2, 1, 4), (0, 1, 8)), ((-1, 1, W),))
    m = gl.arange(0, 8, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, L))))[:, None, None, None]
    h = gl.arange(0, H, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, L))))[None, :, None, None]
    t = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, L))))[None, None, :, None]
    b = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L))))[None, None, None, :]
    d = t * (C // 4) + h * 4 + b if C > 16 else h * 16 + t * 4 + b
    q = gl.permute(gl.load(packed + m * D + d), (1, 2, 3, 0))
    return gl.convert_layout(gl.reshape(q, (16 * H, 8)), OPERAND, assert_trivial=True)


@gluon.jit
def _largest_of_four(x):
    """x [W, 8, 4, 2, 2] float32, for four neighbouring lanes and four tokens -> [W, 8, 4]: lane i gets the maximum for
    token i over the lanes. Each lane passes on half of its values and keeps the other half: 3 shuffles instead of 8,
    and the following work is done once per token, not by four lanes."""
    even, odd = gl.split(x)
    x0, x2 = gl.split(even)
    x1, x3 = gl.split(odd)
    L: gl.constexpr = x0.type.layout
    lane, x0 = gl.broadcast(gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :], x0)
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 k, l, s, t; .reg .pred p, q;
        and.b32 k, $5, 1; setp.ne.s32 p, k, 0; setp.gt.s32 q, $5, 1;
        selp.b32 k, $2, $1, p; selp.b32 s, $1, $2, p; selp.b32 l, $4, $3, p; selp.b32 t, $3, $4, p;
        shfl.sync.bfly.b32 s, s, 1, 31, -1; shfl.sync.bfly.b32 t, t, 1, 31, -1;
        max.f32 k, k, s; max.f32 l, l, t;
        selp.b32 s, k, l, q; selp.b32 k, l, k, q;
        shfl.sync.bfly.b32 s, s, 2, 31, -1;
        max.f32 $0, k, s;
        }""", "=r,r,r,r,r,r", [x0, x1, x2, x3, lane], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def tile_bins(
    word, scale, q, a, b, n, lowest, per_nat,
    BITS: gl.constexpr, C: gl.constexpr, N: gl.constexpr, W: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Bins [32 W] uint8, one per lane, of tokens with codes word [8 W, 4, C / 4] int32 and scale [8 W, 4] float16. q:
    the operands of N groups of 8 rows; a, b, n: [8] float32 for each group."""
    T: gl.constexpr = 32 * W
    PARTS: gl.constexpr = len(q) // N
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 4)
    worth = gl.reshape(gl.permute(gl.reshape(scale.to(gl.float32), (W, 8, 2, 2)), (2, 0, 3, 1)), (T,))
    worth = gl.convert_layout(worth, gl.SliceLayout(1, MMA), assert_trivial=True)
    fields = ()
    for part in gl.static_range(PARTS):
        if C > 16:
            field = _field(word, part, BITS, C, W)
        else:
            field = gl.join(_field(word, 2 * part, BITS, C, W), _field(word, 2 * part + 1, BITS, C, W))
            field = gl.reshape(gl.permute(field, (0, 2, 1)), (T, 32))
        fields = fields + (gl.convert_layout(field, A, assert_trivial=True),)
    score = gl.full((T, 8), float("-inf"), gl.float32, MMA)
    for i in gl.static_range(N):
        products = gl.full((T, 8), START, gl.int32, MMA)
        for part in gl.static_range(PARTS):
            products = mma_v2(fields[part], q[i * PARTS + part], products)
        x = products.to(gl.float32, bitcast=True) - START_FLOAT
        x = (x * a[i][None, :] + b[i][None, :]) * worth[:, None] - n[i][None, :]
        score = gl.maximum(score, x) if i > 0 else x
    score = gl.permute(gl.max(gl.reshape(score, (2, W, 2, 8, 4, 2)), 5), (1, 3, 4, 0, 2))
    bin = (gl.reshape(_largest_of_four(score), (T,)) - lowest) * per_nat
    # The minimum of 255 and NaN is 255. Adding 2^23 with rounding down leaves the floor in the low bits.
    bin = gl.maximum(gl.minimum(bin, 255.0), 0.0)
    bin = gl.inline_asm_elementwise(
        "add.rm.f32 $0, $1, 0f4B000000;", "=r,r", [bin], dtype=gl.int32, is_pure=True, pack=1
    )
    return gl.convert_layout(bin.to(gl.uint8), gl.BlockedLayout([1], [32], [W], [0]), assert_trivial=True)
