"""Arithmetic on int32 words of 32 flags, shared by the kernels that write and read selections.

Flag p of a row is bit p % 32 of word p // 32. It uses only shifts, masks and adds, so that the interpreter can run it
too. The compiler recognizes the population count and emits one instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def popcount(words):
    """Number of bits set in each int32 word."""
    x = words.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def low_bits(n):
    """Words in which the lowest n bits are set: none for n <= 0, all for n >= 32."""
    return tl.where(n >= 32, -1, (1 << tl.minimum(tl.maximum(n, 0), 31)) - 1)


@triton.jit
def drop_lowest(words, n):
    """The words without their n lowest set bits. n has the shape of words; a negative n drops nothing."""
    for i in range(32):
        words = tl.where(i < n, words & (words - 1), words)
    return words


@triton.jit
def pack(flags, SIZE: tl.constexpr):
    """bool [SIZE] -> int32 [SIZE // 32]"""
    lane = tl.arange(0, 32)
    return tl.sum(tl.reshape(flags.to(tl.int32), [SIZE // 32, 32]) << lane[None, :], 1)
