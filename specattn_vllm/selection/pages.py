"""The paged cache seen as single-token, single-head pages.

vLLM gives each layer its cache as `[B, H, N, 2D]` (blocks, KV heads, tokens in a block, key then value), with strides
that depend on the cache layout. The key and value of one token and head always lie together. So the cache is also a
flat list of rows of 2D elements, and a page table of row ids can pick any token for any head.
"""

from __future__ import annotations

import torch


def page_strides(kv_cache: torch.Tensor) -> tuple[int, int, int]:
    """Strides between blocks, heads and tokens, in rows: id = block * s[0] + head * s[1] + token * s[2].

    Raises ValueError for a layout whose strides are not multiples of a row, and for a cache of more rows than ids of 32
    bits can name: for rows of 128 bytes, that is 256 GiB of one layer.
    """
    row = kv_cache.shape[3]
    # A dimension of size 1 may have any stride, because the stride is never used.
    dims = zip(kv_cache.shape[:3], kv_cache.stride()[:3], strict=True)
    strides = [0 if size == 1 else stride for size, stride in dims]
    if kv_cache.stride(3) != 1 or any(stride % row for stride in strides):
        raise ValueError(
            f"KV cache strides {tuple(kv_cache.stride())} for shape {tuple(kv_cache.shape)} cannot be read as rows of "
            f"{row}: use the LBNHC or LBHNC layout (VLLM_KV_CACHE_LAYOUT)"
        )
    last = sum((size - 1) * stride for size, stride in zip(kv_cache.shape[:3], strides, strict=True)) // row
    if last >= 2**31:
        raise ValueError(
            f"the KV cache of a layer has {last + 1:,} rows of keys and values, and 32 bits name 2,147,483,648: "
            "lower --gpu-memory-utilization or set --num-gpu-blocks-override"
        )
    block, head, token = (stride // row for stride in strides)
    return block, head, token


def token_pages(kv_cache: torch.Tensor, heads: int) -> torch.Tensor:
    """The cache as pages [P, 1, heads, 2D] of one token, a view on the same storage.

    Page p starts at row p of the cache. With heads = 1 a page is one token of one head. With heads = H it is all heads
    of one token, and only the row ids of head 0 are valid pages.
    """
    blocks, all_heads, tokens, row = kv_cache.shape
    if heads not in (1, all_heads):
        raise ValueError(f"heads: got {heads}, wanted 1 or the cache's {all_heads}")
    block, head, token = page_strides(kv_cache)
    first_of_last = (blocks - 1) * block + (tokens - 1) * token
    rows = first_of_last + 1 if heads == all_heads else first_of_last + (all_heads - 1) * head + 1
    # Dimensions of size 1 get the stride of a row. A cache may have stride 0 there, which Hopper's tensor memory
    # accelerator refuses.
    return kv_cache.as_strided((rows, 1, heads, row), (row, row, head * row or row, 1))
