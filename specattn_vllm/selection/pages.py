"""The paged cache seen as single-token, single-head pages.

vLLM hands a layer its cache as `[B, H, N, 2D]` (blocks, KV heads, tokens in a block, key then value) with the strides
of whatever layout is in force. Key and value of one token and head always lie together, so the cache is also a flat
list of rows of 2D elements, and a page table of row ids can pick any token for any head.
"""

from __future__ import annotations

import torch


def page_strides(kv_cache: torch.Tensor) -> tuple[int, int, int]:
    """Rows between neighbouring blocks, heads and tokens: id = block * s[0] + head * s[1] + token * s[2].

    Raises ValueError for a layout whose strides are no multiple of a row.
    """
    row = kv_cache.shape[3]
    # A dimension of size 1 may have any stride; it is never stepped over.
    dims = zip(kv_cache.shape[:3], kv_cache.stride()[:3], strict=True)
    strides = [0 if size == 1 else stride for size, stride in dims]
    if kv_cache.stride(3) != 1 or any(stride % row for stride in strides):
        raise ValueError(
            f"KV cache strides {tuple(kv_cache.stride())} for shape {tuple(kv_cache.shape)} cannot be read as rows of "
            f"{row}: use the LBNHC or LBHNC layout (VLLM_KV_CACHE_LAYOUT)"
        )
    block, head, token = (stride // row for stride in strides)
    return block, head, token


def folded_pages(kv_cache: torch.Tensor) -> torch.Tensor:
    """The cache as [P, 2D] rows, a view on the same storage; P covers the last row of the last block."""
    blocks, heads, tokens, row = kv_cache.shape
    block, head, token = page_strides(kv_cache)
    rows = (blocks - 1) * block + (heads - 1) * head + (tokens - 1) * token + 1
    return kv_cache.as_strided((rows, row), (row, 1))
