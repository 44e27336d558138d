"""What the operations that sum a context, or use its mean, are given for that, checked as in ``contracts.py``."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import contracts
from .contracts import FLOATS, expect, tensor

LONGEST = 1024
"""Positions that one program of ``sum_context`` takes, and a verification of a row."""


class Mean(NamedTuple):
    """What ``sparse_attention`` needs to count what it does not read as its mean; each as in ``add_unread.py``."""

    block_table: torch.Tensor
    lens: torch.Tensor
    seq_lens: torch.Tensor
    slots: torch.Tensor
    sums: torch.Tensor
    summed: torch.Tensor


def _context(kv_cache, block_table, slots, lens, sums, summed) -> None:
    tensor("kv_cache", kv_cache, (None, None, None, None), FLOATS)
    heads, width, dev = kv_cache.shape[1], kv_cache.shape[3], kv_cache.device
    expect(width % 2 == 0, "kv_cache", f"rows of {width}", "a key and a value")
    tensor("slots", slots, (None,), torch.int64, dev)
    rows = slots.shape[0]
    tensor("block_table", block_table, (rows, None), torch.int32, dev)
    tensor("lens", lens, (rows,), torch.int32, dev)
    tensor("sums", sums, (None, heads, width), torch.float32, dev)
    tensor("summed", summed, (sums.shape[0], heads), torch.int32, dev)


def sum_context(kv_cache, block_table, slots, lens, sums, summed, longest) -> None:
    _context(kv_cache, block_table, slots, lens, sums, summed)
    expect(longest >= 1, "longest", longest, "at least 1")


def mean(kv_cache, given: Mean, rows: int) -> None:
    """What ``sparse_attention`` is given for the mean, of as many rows; it has checked the rest."""
    _context(kv_cache, given.block_table, given.slots, given.lens, given.sums, given.summed)
    expect(given.slots.shape[0] == rows, "slots", f"{given.slots.shape[0]} rows", f"the {rows} rows of the page table")
    tensor("seq_lens", given.seq_lens, (rows,), torch.int32, kv_cache.device)


def add_unread(
    query, out, lse, kv_cache, block_table, lens, seq_lens, kept, slots, sums, summed, query_start_loc, max_query_len
) -> None:
    tensor("query", query, (None, None, None), FLOATS)
    tokens, query_heads, size = query.shape
    dev = query.device
    tensor("out", out, (tokens, query_heads, size), query.dtype, dev)
    tensor("lse", lse, (tokens, query_heads), torch.float32, dev)
    _context(kv_cache, block_table, slots, lens, sums, summed)
    rows, heads = slots.shape[0], sums.shape[1]
    contracts.group_size(query_heads, heads, "kv_cache")
    expect(kv_cache.shape[3] == 2 * size, "kv_cache", f"rows of {kv_cache.shape[3]}", f"{2 * size} for heads of {size}")
    expect(kv_cache.device == dev, "kv_cache", kv_cache.device, dev)
    tensor("seq_lens", seq_lens, (rows,), torch.int32, dev)
    tensor("kept", kept, (rows, None), torch.int32, dev)
    expect(kept.shape[1] in (1, heads), "kept", f"{kept.shape[1]} groups", f"1 or {heads}")
    tensor("query_start_loc", query_start_loc, (rows + 1,), torch.int32, dev)
    expect(max_query_len >= 1, "max_query_len", max_query_len, "at least 1")
