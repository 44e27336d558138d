"""Builders of poisoned inputs: whatever a kernel must not read is NaN or an index far out of range."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

# Following one of these faults or reads NaN; both kinds turn up in a block table that is not cleared between requests.
STALE_BLOCKS = (2_000_000_000, -7)
OFFSET = 48  # elements before the cache in its storage


@dataclass
class Paged:
    """A paged cache and what it holds: ``keys[r]``, ``values[r]`` are [H, seq_len, D]."""

    kv_cache: torch.Tensor  # [B, H, N, 2D], any layout
    kv_pages: torch.Tensor  # [B * N * H, 2D], the same storage
    page_strides: tuple[int, int, int]
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]


def _paged(lens, heads, size, block_size, layout, device, dtype, seed=0, extra_blocks=2, in_order=False):
    gen = torch.Generator().manual_seed(seed)
    used = [-(-n // block_size) for n in lens]
    blocks = sum(used) + 3  # some blocks belong to nobody
    width = max(used) + extra_blocks
    shape = (blocks, block_size, heads, 2 * size) if layout == "LBNHC" else (blocks, heads, block_size, 2 * size)
    numel = blocks * block_size * heads * 2 * size
    storage = torch.full((OFFSET + numel,), torch.nan, dtype=dtype)
    ids = torch.arange(blocks) if in_order else torch.randperm(blocks, generator=gen)
    table = torch.tensor(STALE_BLOCKS, dtype=torch.int32).repeat(len(lens), width)[:, :width].contiguous()
    flat = storage[OFFSET:].view(shape)
    logical = flat.transpose(1, 2) if layout == "LBNHC" else flat
    keys, values, first = [], [], 0
    for r, n in enumerate(lens):
        mine = ids[first : first + used[r]]
        first += used[r]
        table[r, : used[r]] = mine.int()
        content = torch.randn(heads, n, 2 * size, generator=gen).to(dtype)
        for i, block in enumerate(mine.tolist()):
            part = content[:, i * block_size : (i + 1) * block_size]
            logical[block, :, : part.shape[1]] = part
        keys.append(content[..., :size].to(device))
        values.append(content[..., size:].to(device))
    storage = storage.to(device)
    flat = storage[OFFSET:].view(shape)
    strides = (block_size * heads, 1, heads) if layout == "LBNHC" else (heads * block_size, block_size, 1)
    return Paged(
        flat.transpose(1, 2) if layout == "LBNHC" else flat,
        flat.view(-1, 2 * size),
        strides,
        table.to(device),
        torch.tensor(lens, dtype=torch.int32, device=device),
        keys,
        values,
    )


@pytest.fixture(scope="session")
def paged():
    return _paged


@pytest.fixture(scope="session")
def poisoned():
    """poisoned(shape, dtype, device): a buffer full of NaN, or of a bit pattern no result has."""

    def make(shape, dtype, device):
        value = torch.nan if dtype.is_floating_point else -858993460
        return torch.full(shape, value, dtype=dtype, device=device)

    return make
