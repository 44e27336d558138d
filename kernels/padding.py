"""Sizes that are no power of two. Triton's vectors have 2^n elements, so a tile has more columns than there are data,
and the last ones are masked. They are 0, which changes no product. Tiles of a power of two have no such mask: loads
without masks pipeline best, and these sizes are the usual ones.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def padded(size: int) -> int:
    """The power of two that is not below a size."""
    return 1 << (size - 1).bit_length()


@triton.jit
def both(rows, columns, SIZE: tl.constexpr):
    """The mask of a tile by a mask of its rows, and one of its columns, which is needed if SIZE is no power of two."""
    mask = rows & columns if padded(SIZE) > SIZE else rows
    return mask


@triton.jit
def load(pointer, columns, SIZE: tl.constexpr):
    """A tile whose rows are all inside."""
    tile = tl.load(pointer, mask=columns, other=0.0) if padded(SIZE) > SIZE else tl.load(pointer)
    return tile


@triton.jit
def store(pointer, tile, columns, SIZE: tl.constexpr):
    """Stores a tile whose rows are all inside."""
    if padded(SIZE) > SIZE:
        tl.store(pointer, tile, mask=columns)
    else:
        tl.store(pointer, tile)
