"""The selection operations in PyTorch."""

from __future__ import annotations

import torch

from ..contracts import checked
from . import contracts


def unpack_bits(bits: torch.Tensor, length: int) -> torch.Tensor:
    """bits [..., W] int32 -> bool [..., length]; bit p % 32 of word p // 32 is position p; length <= 32 * W."""
    shifts = torch.arange(32, dtype=torch.int32, device=bits.device)
    words = bits[..., : -(-length // 32)]
    return ((words.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :length].bool()


def _pack_bits(flags: torch.Tensor) -> torch.Tensor:
    """bool [X, 32 * n] -> int32 [X, n]; the inverse of ``unpack_bits``."""
    weights = torch.ones((), dtype=torch.int64, device=flags.device) << torch.arange(32, device=flags.device)
    # 2^31 does not fit int32: sum in int64 and let the cast wrap.
    return (flags.unflatten(-1, (-1, 32)) * weights).sum(-1).to(torch.int32)


@checked(contracts.accumulate_mass)
def accumulate_mass(scores, lse, lens, mass, weight, combine) -> None:
    groups = mass.shape[1]
    for r, length in enumerate(lens.tolist()):
        if length == 0:
            continue
        probs = torch.exp(scores[r, :, :length].float() - lse[r, :, None])
        new = probs.unflatten(0, (groups, -1)).sum(1).mul_(weight)
        if combine == "add":
            new += mass[r, :, :length]
        mass[r, :, :length] = new


@checked(contracts.dilate_mass)
def dilate_mass(mass, lens, out, steps, weight) -> None:
    for x, length in enumerate(lens.tolist()):
        spread = mass[x, :length].clone()
        for d in range(1, min(steps, length - 1) + 1):
            torch.maximum(spread[d:], mass[x, : length - d], out=spread[d:])
        torch.mul(spread, weight, out=out[x, :length])


@checked(contracts.select_top_p)
def select_top_p(
    mass, lens, bits, counts, top_p, min_tokens, max_tokens, max_fraction, sink, recent, union=False
) -> None:
    longest = int(lens.max()) if lens.numel() else 0
    mass = mass[:, :longest]
    if not union:
        bits.zero_()
    if longest:
        pos = torch.arange(longest, device=mass.device)
        length = lens.long()[:, None]
        inside = pos < length
        forced = inside & ((pos < sink) | (pos >= length - recent))
        quanta = (mass.nan_to_num(0.0).clamp(0.0, 1.0) * float(1 << 30)).long().masked_fill_(~inside, 0)
        # One integer per token that sorts tokens in the order of selection: forced ones, then by mass, then by
        # position; tokens past the length last. The position bits make every key unique, so any sort is exact.
        key = (quanta << 31) | pos
        key = key.masked_fill_(forced, 1 << 62).masked_fill_(~inside, -1)
        order = key.sort(dim=-1, descending=True).indices
        total = quanta.sum(-1, keepdim=True)
        n_forced = forced.sum(-1, keepdim=True)
        if top_p >= 1:
            wanted = length
        else:
            target = (total * round(top_p * 65536) + 65535) >> 16
            # The length of the shortest prefix that reaches the target is the number of prefixes that do not.
            taken = quanta.gather(-1, order)
            wanted = ((taken.cumsum(-1) - taken) < target).logical_and_(inside).sum(-1, keepdim=True)
            wanted = wanted.maximum(n_forced)
        upper = ((length * round(max_fraction * 65536) + 65535) >> 16).clamp(min=min_tokens)
        if max_tokens >= 0:
            upper = upper.clamp(max=max_tokens)
        upper = upper.maximum(n_forced).minimum(length)
        lower = upper.clamp(max=min_tokens)
        n = wanted.minimum(upper).maximum(lower)
        flags = torch.zeros(mass.shape[0], -(-longest // 32) * 32, dtype=torch.bool, device=mass.device)
        flags.scatter_(-1, order, pos < n)
        bits[:, : flags.shape[1] // 32] |= _pack_bits(flags)
        counts.copy_(n[:, 0])
    else:
        counts.zero_()
    if union:
        counts.copy_(unpack_bits(bits, bits.shape[1] * 32).sum(-1))


@checked(contracts.build_page_tables)
def build_page_tables(
    bits, slots, prefix_lens, seq_lens, block_table, block_size, page_strides, page_table, kept, sources=None,
    groups=None,
) -> None:  # fmt: skip
    per_block, per_head, per_token = page_strides
    words = bits.shape[3]
    tables, _, heads, width = page_table.shape
    head_offsets = torch.arange(heads, dtype=torch.int32, device=bits.device) * per_head
    rows = zip(slots.tolist(), prefix_lens.tolist(), seq_lens.tolist(), strict=True)
    for r, (slot, prefix, length) in enumerate(rows):
        length = min(length, width)
        if slot < 0 or length <= 0:
            kept[:, r] = 0
            continue
        blocks = block_table[r, : -(-length // block_size), None] * per_block
        in_block = torch.arange(block_size, dtype=torch.int32, device=bits.device) * per_token
        ids = (blocks + in_block).flatten()[:length]
        prefix = max(0, min(prefix, length, words * 32))
        if prefix == 0:
            page_table[:, r, :, :length] = ids + head_offsets[:, None]
            kept[:, r] = length
            continue
        chosen = bits[:, slot] if sources is None else bits[sources.long()[:, None], slot, groups.long()]
        flags = torch.ones(tables, heads, length, dtype=torch.bool, device=bits.device)
        flags[..., :prefix] = unpack_bits(chosen, prefix)
        flags = flags.view(tables * heads, length)
        counts = flags.sum(-1)
        row, pos = flags.nonzero(as_tuple=True)
        column = torch.arange(row.shape[0], device=bits.device) - (counts.cumsum(0) - counts)[row]
        kept[:, r] = counts.view(tables, heads).to(torch.int32)
        head = row % heads
        page_table[row // heads, r, head, column] = ids[pos] + head_offsets[head]


@checked(contracts.build_block_tables)
def build_block_tables(
    bits, slots, prefix_lens, seq_lens, block_table, block_size, page_strides, page_table, kept, sources=None,
    groups=None,
) -> None:  # fmt: skip
    words = bits.shape[3]
    rows = zip(slots.tolist(), prefix_lens.tolist(), seq_lens.tolist(), strict=True)
    for r, (slot, prefix, length) in enumerate(rows):
        if slot < 0 or length <= 0:
            kept[:, r] = 0
            continue
        blocks = -(-length // block_size)
        prefix = max(0, min(prefix, length, words * 32))
        flags = torch.ones(bits.shape[0], blocks * block_size, dtype=torch.bool, device=bits.device)
        flags[:, length:] = False
        flags[:, :prefix] = unpack_bits(bits[:, slot, 0], prefix)
        whole = flags.view(-1, blocks, block_size).any(-1)
        missing = torch.where(whole[:, -1], blocks * block_size - length, 0)
        kept[:, r, 0] = (whole.sum(-1) * block_size - missing).to(torch.int32)
        for s, picked in enumerate(whole):
            ids = block_table[r, :blocks][picked]
            page_table[s, r, 0, : ids.shape[0]] = ids


@checked(contracts.mark_rows)
def mark_rows(query_start_loc, seq_lens, max_query_len, scored_rows, lens) -> None:
    rows = seq_lens.shape[0]
    begin, end = query_start_loc[:-1], query_start_loc[1:]
    live = (end > begin) & (seq_lens > 0)
    first = torch.where(end - begin > max_query_len, end - 1, begin)
    scored_rows.fill_(-1)
    scored_rows[:rows] = torch.where(live[:, None], torch.stack((first, end - 1), dim=1), -1)
    lens.zero_()
    lens[:rows] = torch.where(live, seq_lens - (end - 1 - first), 0)
