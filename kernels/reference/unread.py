"""What stands for the tokens that a selection leaves out, in plain PyTorch."""

from __future__ import annotations

import torch

from .. import unread_contracts
from ..unread_contracts import LONGEST


def sum_context(kv_cache, block_table, slots, lens, sums, summed, longest=LONGEST) -> None:
    """Sums taken further. See ``sum_context.sum_context``."""
    unread_contracts.sum_context(kv_cache, block_table, slots, lens, sums, summed, longest)
    for r, (slot, length) in enumerate(zip(slots.tolist(), lens.tolist(), strict=True)):
        if slot < 0:
            continue
        for h, first in enumerate(summed[slot].tolist()):
            end = min(length, first + longest)
            if end <= first:
                continue
            position = torch.arange(first, end, device=kv_cache.device)
            blocks = block_table[r, position // kv_cache.shape[2]].long()
            new = kv_cache[blocks, h, position % kv_cache.shape[2]].float().sum(0)
            sums[slot, h] = new if first == 0 else sums[slot, h] + new
            summed[slot, h] = end


def add_unread(
    query, out, lse, kv_cache, block_table, lens, seq_lens, kept, slots, sums, summed, query_start_loc, scale,
    max_query_len,
) -> None:  # fmt: skip
    """Sums taken further, and attention corrected. See ``add_unread.add_unread``."""
    unread_contracts.add_unread(
        query, out, lse, kv_cache, block_table, lens, seq_lens, kept, slots, sums, summed, query_start_loc,
        max_query_len,
    )  # fmt: skip
    sum_context(kv_cache, block_table, slots, lens, sums, summed)
    heads, size = sums.shape[1], query.shape[2]
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    for r, (slot, counts) in enumerate(zip(slots.tolist(), kept.expand(-1, heads).tolist(), strict=True)):
        rows = slice(starts[r], starts[r + 1])
        if slot < 0 or rows.start == rows.stop:
            continue
        for h, (read, count) in enumerate(zip(counts, summed[slot].tolist(), strict=True)):
            unread = lengths[r] - read
            if unread <= 0 or count <= 0 or read <= 0:
                continue
            key, value = (sums[slot, h] / count).split(size)
            group = slice(h * (query.shape[1] // heads), (h + 1) * (query.shape[1] // heads))
            weight = query[rows, group].float() @ key * scale + torch.tensor(float(unread)).log().item()
            share = torch.sigmoid(weight - lse[rows, group])[..., None]
            old = out[rows, group].float()
            out[rows, group] = (old + share * (value - old)).to(out.dtype)
