"""The guarantee's operations in PyTorch, one request and head at a time."""

from __future__ import annotations

import torch

from ..contracts import checked
from . import contracts
from .contracts import JITTER_BITS, UNIFORM_PART, weight_table

_MASK = 0xFFFFFFFF


def jitter(length: int, stream: int, draws: int) -> torch.Tensor:
    """Pseudorandom integers [draws] int64 below 2^JITTER_BITS. stream: a number for the layer and the head."""
    x = torch.arange(draws, dtype=torch.int64) * 0x9E3779B1 + length * 0x85EBCA77 + stream * 0x27D4EB2F & _MASK
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x2C1B3C6D & _MASK
    x ^= x >> 16
    return x >> (32 - JITTER_BITS)


def points(total: int, draws: int, drawn: torch.Tensor) -> torch.Tensor:
    """Where the draws fall in 0..total-1, ascending [draws] int64: one in each of as many equal parts."""
    within = ((total >> 10) * drawn >> (JITTER_BITS - 10)) if total >= 1024 else (total * drawn >> JITTER_BITS)
    return (torch.arange(draws, dtype=torch.int64) * total + within) // draws


def unread_of(bins: torch.Tensor, threshold: int, skip: int, sink: int, recent: int) -> torch.Tensor:
    """Whether each token of the context is unread [context] bool, from its bins [context] and a head's cut."""
    p = torch.arange(bins.shape[0], device=bins.device)
    free = (p >= sink) & (p < bins.shape[0] - recent)
    tie = free & (bins == threshold)
    return free & (bins < threshold) | tie & (tie.cumsum(0) <= skip)


@checked(contracts.sample_unread)
def sample_unread(
    scores, histogram, chunks, cuts, starts, query_start_loc, seq_lens, sink, recent, layer, positions, worth
) -> None:
    heads, draws = positions.shape[1:]
    begins, lengths, values = query_start_loc.tolist(), seq_lens.tolist(), weight_table(scores.device)
    positions.fill_(-1)
    for r, length in enumerate(lengths):
        context = length - (begins[r + 1] - begins[r])
        for h, (threshold, skip) in enumerate(cuts[r].tolist()):
            if threshold < 0 or context <= 0:
                continue
            bins = scores[r, h, :context].long()
            unread = unread_of(bins, threshold, skip, sink, recent).nonzero().flatten()
            if not unread.numel():
                continue
            weights = values[bins[unread]]
            weights = weights + max(int(weights.sum()) // (UNIFORM_PART * unread.numel()), 1)
            ends = weights.cumsum(0)
            total = int(ends[-1])
            drawn = jitter(length, layer * heads + h, draws).to(scores.device)
            at = torch.searchsorted(ends, points(total, draws, drawn.cpu()).to(scores.device), right=True)
            positions[r, h] = unread[at].int()
            worth[r, h] = total / weights[at].float()


@checked(contracts.bound_lost)
def bound_lost(
    query, kv_cache, block_table, query_start_loc, positions, worth, lse, scale, quantile, max_query_len, lost
) -> None:
    heads, size, block_size = kv_cache.shape[1], query.shape[2], kv_cache.shape[2]
    group, draws = query.shape[1] // heads, positions.shape[2]
    begins = query_start_loc.tolist()
    lost.zero_()
    for r in range(positions.shape[0]):
        begin, end = begins[r], begins[r + 1]
        for h in (positions[r, :, 0] >= 0).nonzero().flatten().tolist():
            p = positions[r, h]
            blocks = block_table[r, p // block_size].long()
            keys = kv_cache[blocks, h, p % block_size, :size].float()
            mine = slice(h * group, (h + 1) * group)
            logits = query[begin:end, mine].float() @ keys.T * scale
            found = (logits - lse[begin:end, mine, None]).exp() * worth[r, h]
            spread = found.std(-1) / draws**0.5
            upper = found.mean(-1) + quantile * spread
            lost[r, h] = (upper / (1 + upper)).nan_to_num(1.0, 1.0, 1.0).max()
