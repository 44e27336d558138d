"""The layout of the sketch of a layer's keys: after the keys and values of each block of vLLM's paged cache.

A block is one page of memory. Its first part holds keys and values of its tokens, in vLLM's layout. The rest, which
vLLM calls padding, holds the sketch of the same tokens:

    codes   H x N x C bytes    C = D * bits / 8, the codes of one token and KV head
    scales  H x N float16      the value of one unit of a token's codes

So a block always carries its sketch, and prefix-cache hits, preemption, reuse of blocks and copies of whole pages need
no bookkeeping. Byte j of a token's codes holds F = 8 / bits elements of the rotated key: element i * C + j is in bits
i * bits and up, for i = 0 to F - 1. A code u means the level 2 u - (2^bits - 1): odd numbers around 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..contracts import expect

STEPS = {1: 1.5958, 2: 0.9957, 4: 0.3352}
"""By the bits of a code: distance of neighbouring levels, in standard deviations, that minimises the squared error for
a normal variable (Max, 1960)."""
SCALE_BYTES = 2


def bits_of(codes: torch.Tensor, head_size: int) -> int:
    """The bits of a code; codes [B, H, N, C]."""
    code_bytes = codes.shape[3]
    bits = code_bytes * 8 // head_size
    expect(bits in STEPS and bits * head_size == code_bytes * 8, "codes", f"{code_bytes} bytes", "1, 2 or 4 bits a key")
    return bits


@dataclass(frozen=True)
class SketchLayout:
    """Sizes of one layer's sketch, in bytes unless stated otherwise."""

    heads: int
    """KV heads of this rank."""
    block_size: int
    """Tokens of a block."""
    head_size: int
    """Elements of a key."""
    bits: int
    """Bits of a code."""
    element_size: int
    """Bytes of one element of the cache."""

    @property
    def code_bytes(self) -> int:
        """Codes of one token and KV head."""
        return self.head_size * self.bits // 8

    @property
    def token_bytes(self) -> int:
        """Codes and scale of one token and KV head: the bytes that a scan reads."""
        return self.code_bytes + SCALE_BYTES

    @property
    def kv_bytes(self) -> int:
        """Key and value of one token and KV head."""
        return 2 * self.head_size * self.element_size

    @property
    def page_bytes(self) -> int:
        """A block's keys and values."""
        return self.heads * self.block_size * self.kv_bytes

    @property
    def used_bytes(self) -> int:
        """A block's sketch."""
        return self.heads * self.block_size * self.token_bytes

    @property
    def tail_bytes(self) -> int:
        """The bytes added to a page: the sketch, rounded up to whole key-value rows of one token and head. Page ids
        count such rows, so each block must begin at a whole row."""
        return -(-self.used_bytes // self.kv_bytes) * self.kv_bytes


def sketch_views(kv_cache: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [B, H, N, C] uint8 and scales [B, H, N] float16 of a layer's cache [B, H, N, 2D], as views of its memory.

    Raises ValueError if the blocks have no room for a sketch.
    """
    blocks, heads, tokens, row = kv_cache.shape
    size = kv_cache.element_size()
    layout = SketchLayout(heads, tokens, row // 2, bits, size)
    page = kv_cache.stride(0) * size
    if blocks > 1 and page < layout.page_bytes + layout.tail_bytes:
        raise ValueError(
            f"kv_cache: got blocks of {page} bytes, wanted {layout.page_bytes} for keys and values and "
            f"{layout.tail_bytes} for their sketch"
        )
    raw = torch.empty(0, dtype=torch.uint8, device=kv_cache.device).set_(kv_cache.untyped_storage())
    first = kv_cache.storage_offset() * size + layout.page_bytes
    per_head = tokens * layout.code_bytes
    codes = raw.as_strided((blocks, heads, tokens, layout.code_bytes), (page, per_head, layout.code_bytes, 1), first)
    scales = raw.view(torch.float16).as_strided(
        (blocks, heads, tokens), (page // SCALE_BYTES, tokens, 1), (first + heads * per_head) // SCALE_BYTES
    )
    return codes, scales
