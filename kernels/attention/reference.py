"""Attention in PyTorch: one request at a time, in fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..contracts import checked
from . import contracts
from .sinks import weigh_against_sinks
from .soft_cap import soft_capped


def _gather(kv_cache: torch.Tensor, blocks: torch.Tensor, length: int) -> torch.Tensor:
    """The first ``length`` tokens of the given blocks as [H, length, last dim]; ``blocks`` must have no stale entry.

    Copying takes most of the time of a decode step. So consecutive blocks are sliced, not copied, if the layout allows;
    a fresh cache gives out consecutive blocks.
    """
    first = int(blocks[0])
    in_order = torch.arange(first, first + blocks.shape[0], dtype=blocks.dtype, device=blocks.device)
    if torch.equal(blocks, in_order):
        picked = kv_cache[first : first + blocks.shape[0]]
    elif kv_cache.stride(1) < kv_cache.stride(2):  # tokens outermost: copy whole blocks, heads stay interleaved
        picked = kv_cache.transpose(1, 2).index_select(0, blocks).transpose(1, 2)
    else:
        return kv_cache.transpose(0, 1)[:, blocks].flatten(1, 2)[:, :length]
    return picked.transpose(0, 1).flatten(1, 2)[:, :length]


@checked(contracts.draft_attention)
def draft_attention(
    query, kv_cache, block_table, seq_lens, query_start_loc, scale, out, scored_rows=None, scores=None, lse=None,
    max_query_len=1, requests=None, soft_cap=None,
) -> None:  # fmt: skip
    query_heads, size = query.shape[1:]
    heads, block_size = kv_cache.shape[1:3]
    group = query_heads // heads
    cache = kv_cache if out is not None else kv_cache[..., :size]
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    asked = [[]] * len(lengths) if lse is None else scored_rows.tolist()
    for r in range(len(lengths)) if requests is None else requests.tolist():
        if r < 0:
            continue
        length, begin, end = lengths[r], starts[r], starts[r + 1]
        scored = [(c, row - begin) for c, row in enumerate(asked[r]) if begin <= row < end]
        n = end - begin
        tokens = range(n) if out is not None else sorted({i for _, i in scored})
        if not tokens:
            continue
        lse_of = None if lse is None else lse[r].view(heads, -1, group)
        if length <= 0:
            if out is not None:
                out[begin:end] = 0
            for c, _ in scored:
                lse_of[:, c] = -torch.inf
            continue
        kv = _gather(cache, block_table[r, : -(-length // block_size)], length).float()
        q = query[begin:end] if out is not None else query[[begin + i for i in tokens]]
        q = q.unflatten(1, (heads, group)).transpose(0, 1).reshape(heads, -1, size)
        logits = torch.bmm(q.float() * scale, kv[..., :size].transpose(1, 2)).view(heads, -1, group, length)
        logits = soft_capped(logits, soft_cap)
        if n > 1:
            visible = torch.tensor([length - (n - 1 - i) for i in tokens], device=query.device)
            hidden = torch.arange(length, device=query.device) >= visible[:, None]
            logits.masked_fill_(hidden[:, None], -torch.inf)
        for c, i in scored:
            seen, row = max(length - (n - 1 - i), 0), logits[:, tokens.index(i)]
            if scores is not None:
                scores[r].unflatten(0, (heads, -1, group))[:, c, :, :seen] = row[..., :seen]
            lse_of[:, c] = row.logsumexp(-1)
        if out is not None:
            weights = logits.softmax(-1)
            if n > length:  # softmax of a token that sees nothing
                weights.nan_to_num_(0.0)
            result = torch.bmm(weights.view(heads, n * group, length), kv[..., size:])
            out[begin:end].view(n, heads, group, size).copy_(result.view(heads, n, group, size).transpose(0, 1))


@checked(contracts.sparse_attention)
def sparse_attention(
    query, kv_cache, page_table, kept, query_start_loc, scale, out, max_query_len, lse=None, soft_cap=None,
) -> None:  # fmt: skip
    query_heads, size = query.shape[1:]
    heads, head_rows = kv_cache.shape[1], kv_cache.stride(1) // (2 * size)
    group = query_heads // heads
    last = sum((n - 1) * stride for n, stride in zip(kv_cache.shape[:3], kv_cache.stride()[:3], strict=True))
    kv_pages = kv_cache.as_strided((last // (2 * size) + 1, 2 * size), (2 * size, 1))
    head_offsets = None
    if page_table.shape[1] == 1 and heads > 1:
        head_offsets = torch.arange(heads, dtype=torch.int32, device=query.device)[:, None] * head_rows
        page_table, kept = page_table.expand(-1, heads, -1), kept.expand(-1, heads)
    starts = query_start_loc.tolist()
    for r, counts in enumerate(kept.tolist()):
        begin, end = starts[r], starts[r + 1]
        live = [h for h, count in enumerate(counts) if count > 0]
        n, longest = end - begin, max(counts)
        if n == 0 or not live:
            continue
        pick = slice(None) if len(live) == heads else torch.tensor(live, device=query.device)
        ids = page_table[r, pick, :longest]
        have = kept[r, pick, None]
        uneven = min(counts[h] for h in live) < longest
        column = torch.arange(longest, device=query.device)
        if uneven:  # entries past kept are undefined: read the head's first page instead, the mask below drops it
            ids = torch.where(column < have, ids, ids[:, :1])
        if head_offsets is not None:
            ids = ids + head_offsets
        kv = kv_pages.index_select(0, ids.flatten()).view(len(live), longest, 2 * size).float()
        q = query[begin:end].unflatten(1, (heads, group)).permute(1, 0, 2, 3)[pick]
        logits = torch.bmm(q.reshape(len(live), n * group, size).float() * scale, kv[..., :size].transpose(1, 2))
        logits = soft_capped(logits, soft_cap).view(len(live), n, group, longest)
        if uneven or n > 1:
            visible = have - torch.arange(n - 1, -1, -1, device=query.device)  # [live, n]
            logits.masked_fill_((column >= visible[..., None]).unsqueeze(2), -torch.inf)
        weights = logits.softmax(-1)
        if n > min(counts[h] for h in live):
            weights = weights.nan_to_num_(0.0)  # softmax of a token that sees nothing
        result = torch.bmm(weights.view(len(live), n * group, longest), kv[..., size:])
        out[begin:end].unflatten(1, (heads, group))[:, pick] = (
            result.view(len(live), n, group, size).transpose(0, 1).to(out.dtype)
        )
        if lse is not None:
            total = logits.logsumexp(-1).transpose(0, 1)
            lse[begin:end].unflatten(1, (heads, group))[:, pick] = total


@checked(contracts.dense_attention)
def dense_attention(
    query, kv_cache, block_table, seq_lens, query_start_loc, scale, out, sinks=None, soft_cap=None,
) -> None:  # fmt: skip
    """Dense causal attention of ragged query rows over the paged cache, in the query dtype. Query token i of the q_len
    tokens of request r attends positions 0..seq_len - q_len + i. Has no Triton version."""
    size = query.shape[2]
    block_size = kv_cache.shape[2]
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    for r in range(len(lengths)):
        begin, end, length = starts[r], starts[r + 1], lengths[r]
        n = end - begin
        if n == 0 or length == 0:
            continue
        kv = _gather(kv_cache, block_table[r, : -(-length // block_size)], length).to(query.dtype)
        if sinks is not None or soft_cap is not None:
            attend_by_logits(query[begin:end], kv, scale, out[begin:end], sinks, soft_cap)
            continue
        mask = None
        if 1 < n < length:  # is_causal aligns top-left, which is correct only for a square
            mask = torch.ones(n, length, dtype=torch.bool, device=query.device).tril_(length - n)
        attended = F.scaled_dot_product_attention(
            query[None, begin:end].transpose(1, 2), kv[None, ..., :size], kv[None, ..., size:],
            attn_mask=mask, is_causal=n == length and n > 1, scale=scale, enable_gqa=True,
        )  # fmt: skip
        out[begin:end] = attended[0].transpose(0, 1)


def attend_by_logits(query, kv, scale, out, sinks=None, soft_cap=None, seen=None) -> None:
    """Attention of one request, with what PyTorch's own does not know. query, out [n, Hq, D]; kv [H, length, 2D];
    seen [n, length] bool: what each row sees; None: the rows are the last n of `length`, and see what is before them.
    """
    n, _, size = query.shape
    heads, length, _ = kv.shape
    if seen is None:
        seen = torch.ones(n, length, dtype=torch.bool, device=query.device).tril_(length - n)
    q = query.transpose(0, 1).unflatten(0, (heads, -1)).float()
    logits = soft_capped(torch.einsum("hgnd,hld->nhgl", q * scale, kv[..., :size].float()), soft_cap)
    logits.masked_fill_(~seen[:, None, None], -torch.inf)
    out.copy_(torch.einsum("nhgl,hld->nhgd", logits.softmax(-1), kv[..., size:].float()).flatten(1, 2))
    if sinks is not None:
        weigh_against_sinks(out, logits.logsumexp(-1).flatten(1), sinks)
