"""The sketch's operations in PyTorch, one request at a time. They run on a CPU, and tests compare the kernels with
them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..contracts import FP8, checked
from ..fp8 import rounded
from . import contracts
from .contracts import BINS, CHUNK, LOWEST, MAX_SAMPLE, PER_NAT, SAMPLE_BLOCK, Budget
from .layout import STEPS, bits_of


@checked(contracts.encode_keys)
def encode_keys(
    key, slot_mapping, rotation, centre, codes, scales, value=None, kv_cache=None, key_scale=1.0, value_scale=1.0
) -> None:
    bits = bits_of(codes, key.shape[2])
    live = slot_mapping >= 0
    key, slot_mapping, tokens = key[: live.shape[0]][live], slot_mapping[live], live.shape[0]
    if not key.shape[0]:
        return
    if value is not None:
        value = value[:tokens][live]
        if kv_cache.dtype == FP8:
            key, value = rounded(key, key_scale), rounded(value, value_scale)
        entries = torch.cat((key, value), dim=-1)
        kv_cache.transpose(1, 2)[slot_mapping // codes.shape[2], slot_mapping % codes.shape[2]] = entries
    x = (key.float() @ rotation.float()) * key.shape[2] ** -0.5 - centre
    step = x.square().mean(-1, keepdim=True).sqrt() * STEPS[bits]
    half = 1 << (bits - 1)
    level = (torch.floor(x / step.clamp(min=1e-30)) + half).nan_to_num(0.0).clamp(0, 2 * half - 1).int()
    fields = level.unflatten(-1, (8 // bits, -1))
    shifts = torch.arange(8 // bits, device=key.device)[:, None] * bits
    block, offset = slot_mapping // codes.shape[2], slot_mapping % codes.shape[2]
    codes.transpose(1, 2)[block, offset] = (fields << shifts).sum(-2).to(torch.uint8)
    estimate = 2.0 * level - (2.0 * half - 1.0)
    scale = x.square().sum(-1) / (x * estimate).sum(-1).clamp(min=1e-30)
    scales.transpose(1, 2)[block, offset] = scale.half()


def unpack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [..., C] uint8 -> [..., D] int32, in the order of the key's elements."""
    shifts = torch.arange(8 // bits, device=codes.device, dtype=torch.int32)[:, None] * bits
    return ((codes.int().unsqueeze(-2) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def _tokens(codes, scales, table, positions, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [H, n, D] float32 and scales [H, n] float32 of a request's tokens at positions [n]."""
    block = table[positions // codes.shape[2]].long()
    offset = positions % codes.shape[2]
    picked = codes.transpose(1, 2)[block, offset].transpose(0, 1)
    return unpack(picked, bits).float(), scales.transpose(1, 2)[block, offset].T.float()


def _logits(packed, factors, codes, scales) -> torch.Tensor:
    """[H, n, M] float32: estimated logits of n tokens for the rows of a request."""
    products = torch.bmm(codes, packed.float().transpose(1, 2))  # whole numbers below 2^24: exact
    return (products * factors[:, None, 0] + factors[:, None, 1]) * scales[..., None]


def _searched(query_start_loc, seq_lens, dense, dense_up_to: int) -> Iterator[tuple[int, int, int, int]]:
    """Rows that are searched: number, context, first token of the query, and end of its tokens."""
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    for r, skip in enumerate(dense.tolist()):
        begin, end = starts[r], starts[r + 1]
        context = lengths[r] - (end - begin)
        if not skip and context > max(dense_up_to, 0) and end > begin:
            yield r, context, begin, end


def _sample(context: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions from which a row's normaliser is estimated, and how many tokens each of them represents."""
    stride = max(-(-context // MAX_SAMPLE), 1)
    last = max(context - SAMPLE_BLOCK, 0) // SAMPLE_BLOCK * SAMPLE_BLOCK
    p = torch.arange(context, device=device)
    block = p // SAMPLE_BLOCK
    chosen = (p >= last) | (block % stride == 0)
    weight = torch.where((p >= last) | (block == 0), 1.0, float(stride))
    return p[chosen], weight[chosen]


@checked(contracts.prepare_queries)
def prepare_queries(
    query, query_start_loc, seq_lens, dense, valid_lens, block_table, codes, scales, rotation, scale, max_query_len,
    dense_up_to, packed, factors, histogram,
) -> None:  # fmt: skip
    histogram.zero_()
    heads, size = packed.shape[1], packed.shape[3]
    group, bits = query.shape[1] // heads, bits_of(codes, size)
    for r, context, begin, end in _searched(query_start_loc, seq_lens, dense, dense_up_to):
        end = min(end, begin + int(valid_lens[r]))
        rows = (end - begin) * group
        q = query[begin:end].unflatten(1, (heads, group)).transpose(0, 1).reshape(heads, rows, size)
        y = (q.float() @ rotation.float()) * size**-0.5
        unit = y.abs().amax(-1).clamp(min=1e-30) / 127.0
        level = torch.floor(y / unit[..., None] + 0.5).nan_to_num(0.0).clamp(-127, 127)
        packed[r] = 0
        packed[r, :, :rows] = level.to(torch.int8)
        factors[r, :, :2], factors[r, :, 2] = 0.0, torch.inf
        factors[r, :, 0, :rows] = 2.0 * unit * scale
        factors[r, :, 1, :rows] = -((1 << bits) - 1.0) * unit * scale * level.sum(-1)
        p, weight = _sample(context, query.device)
        tokens = _tokens(codes, scales, block_table[r], p, bits)
        sampled = _logits(packed[r, :, :rows], factors[r, :, :, :rows], *tokens)
        normaliser = (sampled + weight.log()[:, None]).logsumexp(1)
        factors[r, :, 2, :rows] = normaliser.where(normaliser.isfinite(), 0.0)


@checked(contracts.score_tokens)
def score_tokens(
    packed, factors, query_start_loc, seq_lens, dense, block_table, codes, scales, sink, recent, dense_up_to, scores,
    histogram, chunks,
) -> None:  # fmt: skip
    bits = bits_of(codes, packed.shape[3])
    for r, context, _, _ in _searched(query_start_loc, seq_lens, dense, dense_up_to):
        live = factors[r, 0, 2] != torch.inf
        p = torch.arange(context, device=packed.device)
        tokens = _tokens(codes, scales, block_table[r], p, bits)
        score = (_logits(packed[r, :, live], factors[r, :, :, live], *tokens) - factors[r, :, None, 2, live]).amax(-1)
        bin = torch.floor((score - LOWEST) * PER_NAT).clamp(0, BINS - 1).nan_to_num(BINS - 1.0).to(torch.uint8)
        scores[r, :, :context] = bin
        at = bin.long()[:, sink : max(context - recent, sink)]
        histogram[r].scatter_add_(1, at, torch.ones_like(at, dtype=torch.int32))
        counted = (p >= sink) & (p < context - recent)
        for c in range(-(-context // CHUNK)):
            part = slice(c * CHUNK, min((c + 1) * CHUNK, context))
            for h in range(bin.shape[0]):
                mine = bin[h, part][counted[part]].long()
                chunks[r, h, c] = torch.bincount(mine, minlength=BINS).to(torch.int16)


def _share_out(counts: torch.Tensor, floor: int, budget: int) -> list[int]:
    """How many free tokens each head takes from a common budget. counts [H, BINS]."""
    from_bin = counts.flip(-1).cumsum(-1).flip(-1)
    from_bin = torch.cat((from_bin, torch.zeros_like(from_bin[:, :1])), 1).clamp(min=floor)
    cut = int((from_bin.sum(0) > budget).sum())
    numbers = from_bin[:, cut].tolist()
    if cut:
        left = budget - sum(numbers)
        for h, more in enumerate((from_bin[:, cut - 1] - from_bin[:, cut]).tolist()):
            numbers[h] += min(left, more)
            left -= min(left, more)
    return numbers


def _that_hold(bins: torch.Tensor, forced: torch.Tensor, top_p: float) -> int:
    """The fewest free tokens that hold top_p of the weight. Bins of the free tokens: bins [n]; of the others: forced
    [f]."""
    weights = torch.exp((torch.arange(BINS, device=bins.device) + 0.5) / PER_NAT + LOWEST)
    free = weights[bins.sort(descending=True).values].double()
    total = free.sum() + weights[forced].double().sum()
    need = total * top_p - weights[forced].double().sum()
    return min(int((free.cumsum(0) < need * (1 - 1e-6)).sum()) + 1, bins.shape[0]) if need > 0 else 0


def _limits(context: int, budget: Budget) -> tuple[int, int, int]:
    """(most, floor, forced) tokens of a head."""
    forced = min(context, budget.sink + budget.recent)
    most = max((context * budget.fixed_ratio + 65535) >> 16, budget.min_tokens)
    most = min(most, budget.max_tokens) if budget.max_tokens >= 0 else most
    most = min(max(most, forced), context)
    return most, max(min(budget.min_tokens, most), forced), forced


@checked(contracts.carry_thresholds)
def carry_thresholds(query_start_loc, seq_lens, slots, totals, thresholds, budget: Budget) -> None:
    begins = query_start_loc.tolist()
    for r, length in enumerate(seq_lens.tolist()):
        slot = int(slots[r]) if slots[r] >= 0 else totals.shape[0] - 1
        *counts, heads, beyond = totals[slot].tolist()
        most, _, forced = _limits(max(length - (begins[r + 1] - begins[r]), 0), budget)
        number = heads * (most - forced) - beyond
        from_bin = torch.tensor(counts).flip(-1).cumsum(-1).flip(-1)
        threshold = max(int((from_bin >= number).sum()) - 1, 0)
        above = int(from_bin[threshold]) - counts[threshold]
        part = min(max(number - above, 0) * 65536 // max(counts[threshold], 1), 65536)
        thresholds[slot, 0], thresholds[slot, 1] = threshold if heads else -1, part
        totals[slot] = 0


@checked(contracts.cut_scores)
def cut_scores(
    histogram, chunks, query_start_loc, seq_lens, dense, scores, slots, totals, thresholds, budget: Budget, cuts, starts
) -> None:
    heads = histogram.shape[1]
    begins, lengths, whole = query_start_loc.tolist(), seq_lens.tolist(), dense.tolist()
    for r, length in enumerate(lengths):
        context = max(length - (begins[r + 1] - begins[r]), 0)
        most, floor, forced = _limits(context, budget)
        cuts[r, :, 0], cuts[r, :, 1] = -1, 0
        if whole[r] or (most if budget.top_p is None else floor) >= context:
            continue
        counts = histogram[r].long()
        numbers = [most - forced] * heads
        if budget.top_p is not None:
            bins = scores[r, :, :context].long()
            free = torch.zeros(context, dtype=torch.bool, device=bins.device)
            free[budget.sink : max(context - budget.recent, budget.sink)] = True
            held = [_that_hold(bins[h, free], bins[h, ~free], budget.top_p) for h in range(heads)]
            numbers = [min(max(n, floor - forced), most - forced) for n in held]
        elif budget.shared == "layers":
            slot = int(slots[r]) if slots[r] >= 0 else totals.shape[0] - 1
            carried, part = thresholds[slot].tolist()
            if carried >= 0:
                shares = [
                    int(mine[carried + 1 :].sum()) + ((int(mine[carried]) * part + 32768) >> 16) for mine in counts
                ]
                numbers = [max(share, floor - forced) for share in shares]
                totals[slot, BINS + 1] += sum(numbers) - sum(shares)
            else:
                numbers = _share_out(counts, floor - forced, (most - forced) * heads)
            totals[slot, :BINS] += counts.sum(0).int()
            totals[slot, BINS] += heads
        elif budget.shared == "heads":
            numbers = _share_out(counts, floor - forced, (most - forced) * heads)
        for h, number in enumerate(numbers):
            from_bin = counts[h].flip(-1).cumsum(-1).flip(-1)
            threshold = max(int((from_bin >= number).sum()) - 1, 0)
            cuts[r, h, 0], cuts[r, h, 1] = threshold, int(from_bin[threshold]) - number
            mine = chunks[r, h, : -(-context // CHUNK)].long()
            above, tied = mine[:, threshold + 1 :].sum(-1), mine[:, threshold]
            starts[r, h, : mine.shape[0], 0] = (above.cumsum(0) - above).int()
            starts[r, h, : mine.shape[0], 1] = (tied.cumsum(0) - tied).int()


@checked(contracts.list_pages)
def list_pages(
    scores, cuts, starts, query_start_loc, seq_lens, block_table, block_size, page_strides, sink, recent, ahead,
    page_table, kept,
) -> None:  # fmt: skip
    width, dev = page_table.shape[2], scores.device
    longest = min(scores.shape[2], block_table.shape[1] * block_size)
    per_block, per_head, per_token = page_strides
    begins, lengths, thresholds = query_start_loc.tolist(), seq_lens.tolist(), cuts.tolist()
    for r, length in enumerate(lengths):
        length = min(length, longest)
        if length <= 0:
            kept[r] = 0
            continue
        context = max(length - (begins[r + 1] - begins[r]), 0)
        listed = min(length + ahead, longest)
        p = torch.arange(listed, device=dev)
        free = (p >= sink) & (p < context - recent)
        pages = block_table[r, p // block_size].long() * per_block + p % block_size * per_token
        for h, (threshold, skip) in enumerate(thresholds[r]):
            keep = torch.ones(listed, dtype=torch.bool, device=dev)
            if threshold >= 0:
                bins = torch.zeros(listed, dtype=torch.int32, device=dev)
                bins[:context] = scores[r, h, :context].int()
                tie = free & (bins == threshold)
                keep = ~free | (bins > threshold) | (tie & (tie.cumsum(0) > skip))
            mine = (pages[keep] + h * per_head)[:width]
            page_table[r, h, : mine.shape[0]] = mine.int()
            kept[r, h] = min(int(keep[:length].sum()), width)
