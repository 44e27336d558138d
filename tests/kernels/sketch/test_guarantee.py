"""The sample of unread tokens, and the bound on what they hold: kernels and references, and both against counting."""

from __future__ import annotations

import math

import pytest
import torch

from specattn_vllm.kernels.guarantee import reference
from specattn_vllm.kernels.guarantee.bound import bound_lost
from specattn_vllm.kernels.guarantee.contracts import UNIFORM_PART, weight_table
from specattn_vllm.kernels.guarantee.sample import sample_unread
from specattn_vllm.kernels.sketch import reference as sketch
from specattn_vllm.kernels.sketch.contracts import Budget

# lens, q_lens, KV heads, query heads each, head size, bits, block size, layout, dense rows
BATCHES = [
    pytest.param(([3000, 130, 0, 70, 2500], [6, 6, 0, 3, 1], 2, 4, 128, 2, 16, "LBNHC", (3,)), id="ragged-128"),
    pytest.param(([1500, 2049 + 5, 4200], [5, 5, 1], 3, 3, 64, 2, 32, "LBHNC", ()), id="chunk-edge-64"),
    pytest.param(([400, 2, 1], [1, 1, 1], 1, 1, 64, 2, 16, "LBNHC", ()), id="one-row"),
    # More query rows than the kernel takes at once; in some requests, one of the first loses most.
    pytest.param(([600, 500, 400, 300], [6, 6, 6, 6], 1, 16, 128, 2, 16, "LBNHC", ()), id="gqa-16"),
    pytest.param(([500, 300], [3, 1], 2, 2, 96, 2, 16, "LBNHC", ()), id="head-96"),
    pytest.param(([500, 300], [3, 3], 2, 1, 256, 2, 16, "LBNHC", (1,)), id="head-256"),
]
CPU = torch.device("cpu")
BUDGETS = [
    Budget(0.1),
    Budget(0.1, shared="none", sink=0, recent=0, min_tokens=0),
    Budget(0.7, top_p=0.6),
    Budget(0.97, shared="none", min_tokens=0),
    Budget(1.0),
]


def with_keys(data, seed=0):
    """Keys, values and codes where requests have tokens; all else of the cache stays NaN."""
    generator = torch.Generator().manual_seed(seed)
    block_size, size = data.kv_cache.shape[2], data.query.shape[2]
    for row, length in enumerate(data.seq_lens.tolist()):
        p = torch.arange(length)
        slots = data.block_table[row].cpu()[p // block_size].long() * block_size + p % block_size
        keys = torch.randn(length, data.heads, size, generator=generator).to(data.query)
        places = slots.to(keys.device), data.rotation, data.centre, data.codes, data.scales
        sketch.encode_keys(keys, *places, keys, data.kv_cache)


def logsumexp(data, arguments):
    """[T, Hq] over the tokens of the context that were read, and the mass of the others in units of theirs."""
    block_size, size = data.kv_cache.shape[2], data.query.shape[2]
    lse = torch.full(data.query.shape[:2], 9.0, device=data.query.device)
    mass = torch.zeros_like(lse)
    group = data.query.shape[1] // data.heads
    for row in range(data.rows):
        p = torch.arange(data.context(row))
        mine = slice(int(data.query_start_loc[row]), int(data.query_start_loc[row + 1]))
        for head in range(data.heads):
            left, _ = unread(data, arguments, row, head)
            blocks = data.block_table[row].cpu()[p // block_size].long().to(lse.device)
            keys = data.kv_cache[blocks, head, (p % block_size).to(lse.device), :size].float()
            heads = slice(head * group, (head + 1) * group)
            logits = data.query[mine, heads].float() @ keys.T * size**-0.5
            whole = torch.ones(len(p), dtype=torch.bool, device=lse.device)
            whole[left.to(lse.device)] = False
            if len(left):
                lse[mine, heads] = logits[..., whole].logsumexp(-1)
                mass[mine, heads] = (logits[..., ~whole] - lse[mine, heads, None]).exp().sum(-1)
    return lse, mass


@pytest.fixture
def chosen(sketched, prepared, scored, selected):
    """chosen(batch, budget, device, dtype) -> the batch, and arguments of `sample_unread` before the layer."""

    def run(batch, budget, device=CPU, dtype=torch.float32):
        data = sketched(*batch[:8], device, dtype, dense=batch[8])
        with_keys(data)
        packed, factors, _ = prepared(sketch.prepare_queries, data)
        found = scored(sketch.score_tokens, data, packed, factors, budget.sink, budget.recent)
        cuts, starts, _, kept = selected(sketch.cut_scores, sketch.list_pages, data, *found, budget)
        return data, kept, (*found, cuts, starts, *data.step[:2], budget.sink, budget.recent)

    return run


def drawn(operation, data, arguments, layer=0, draws=64):
    positions = torch.full((data.rows, data.heads, draws), -77, dtype=torch.int32, device=data.query.device)
    worth = torch.full(positions.shape, torch.nan, device=data.query.device)
    operation(*arguments, layer, positions, worth)
    return positions, worth


def unread(data, arguments, row, head):
    scores, cuts, (sink, recent) = arguments[0], arguments[3], arguments[-2:]
    threshold, skip = cuts[row, head].tolist()
    bins = scores[row, head, : data.context(row)].long()
    if threshold < 0:
        return torch.zeros(0, dtype=torch.long), bins
    return reference.unread_of(bins, threshold, skip, sink, recent).nonzero().flatten(), bins


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_kernel_and_reference_draw_the_same(place, chosen, batch, budget):
    data, _, arguments = chosen(batch, budget, *place)
    for layer, draws in ((0, 32), (31, 128)):
        (ours, mine), (theirs, its) = (
            drawn(op, data, arguments, layer, draws) for op in (sample_unread, reference.sample_unread)
        )
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(mine[theirs >= 0], its[theirs >= 0], rtol=1e-6, atol=0)
        assert not mine[theirs >= 0].isnan().any()


@pytest.mark.parametrize("operation", [sample_unread, reference.sample_unread], ids=["kernel", "reference"])
@pytest.mark.parametrize("batch", BATCHES)
def test_only_unread_tokens_are_drawn_and_each_by_its_weight(chosen, batch, operation):
    data, kept, arguments = chosen(batch, Budget(0.2))
    positions, worth = drawn(operation, data, arguments)
    for row in range(data.rows):
        for head in range(data.heads):
            left, bins = unread(data, arguments, row, head)
            assert int(kept[row, head]) + len(left) == int(data.seq_lens[row])
            mine = positions[row, head].long()
            if not len(left):
                assert (mine == -1).all()
                continue
            assert torch.isin(mine, left).all() and (mine.diff() >= 0).all()
            value = weight_table(torch.device("cpu"))[bins[left]].double()
            weight = value + max(int(value.sum()) // (UNIFORM_PART * len(left)), 1)
            odds = dict(zip(left.tolist(), (weight.sum() / weight).tolist(), strict=True))
            wanted = torch.tensor([odds[p] for p in mine.tolist()])
            torch.testing.assert_close(worth[row, head], wanted, rtol=1e-5, atol=0)


def test_other_layers_heads_and_lengths_draw_others_and_the_mean_of_many_is_right(chosen):
    """The number of unread tokens is the mean of 1 / probability."""
    data, _, arguments = chosen(BATCHES[1].values[0], Budget(0.1))
    samples = [drawn(reference.sample_unread, data, arguments, layer, 32) for layer in range(40)]
    assert len({tuple(positions[0, 0].tolist()) for positions, _ in samples}) == 40
    for row in range(2):
        for head in range(data.heads):
            left, _ = unread(data, arguments, row, head)
            found = torch.stack([worth[row, head] for _, worth in samples]).double()
            error = found.std() / math.sqrt(found.numel())
            assert abs(found.mean() - len(left)) < 5 * error


def bounded(operation, data, positions, worth, lse, quantile=1.64):
    lost = torch.full(positions.shape[:2], torch.nan, device=lse.device)
    scale = data.query.shape[2] ** -0.5
    operation(
        data.query, data.kv_cache, data.block_table, data.query_start_loc, positions, worth, lse, scale, quantile,
        data.max_query_len, lost,
    )  # fmt: skip
    return lost


@pytest.mark.parametrize("batch", BATCHES)
def test_kernel_and_reference_bound_the_same(place, chosen, batch):
    device, dtype = place
    if device.type == "cuda" and dtype == torch.float32 and batch[4] == 256:
        pytest.skip("products of 256 x 256 float32 do not fit in a GPU's shared memory")
    data, _, arguments = chosen(batch, Budget(0.2), device, dtype)
    positions, worth = drawn(reference.sample_unread, data, arguments, draws=32)
    lse, _ = logsumexp(data, arguments)
    ours, theirs = (bounded(op, data, positions, worth, lse) for op in (bound_lost, reference.bound_lost))
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-4)
    some = positions[..., 0] >= 0
    assert (theirs[some] > 0).all() and (theirs[~some] == 0).all()


@pytest.mark.parametrize("operation", [bound_lost, reference.bound_lost], ids=["kernel", "reference"])
@pytest.mark.parametrize("what", ["key", "query", "lse"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_no_number_counts_as_lost(chosen, operation, what, number):
    data, _, arguments = chosen(BATCHES[0].values[0], Budget(0.2))
    positions, worth = drawn(reference.sample_unread, data, arguments, draws=32)
    lse, _ = logsumexp(data, arguments)
    before = bounded(operation, data, positions, worth, lse)
    assert (before[0] < 0.99).all()
    if what == "key":
        p = int(positions[0, 1, 5])
        data.kv_cache[int(data.block_table[0, p // 16]), 1, p % 16, 0] = number
    elif what == "query":
        data.query[2, 4:] = math.nan
    else:
        lse[3, 5] = -number
    after = bounded(operation, data, positions, worth, lse)
    assert after[0, 1] == 1
    after[0, 1] = before[0, 1]
    assert torch.equal(after, before), "nobody else changes"


def test_the_bound_holds_nearly_as_often_as_it_says(chosen):
    """The draws of 150 layers for rows whose unread mass is known. Draws are skewed, and the normal quantile is for
    many of them. With 64, a bound of 95% can be too low in up to 15 of 100 rows."""
    data, _, arguments = chosen(([1400] * 4, [1] * 4, 2, 1, 64, 2, 16, "LBNHC", ()), Budget(0.2, shared="none"))
    lse, mass = logsumexp(data, arguments)
    true = mass[:4] / (1 + mass[:4])
    samples = [drawn(reference.sample_unread, data, arguments, layer) for layer in range(150)]
    middle, upper = (
        torch.stack([bounded(reference.bound_lost, data, *sample, lse, z) for sample in samples]) for z in (0, 1.645)
    )
    torch.testing.assert_close((middle / (1 - middle)).mean(0), mass[:4], rtol=0.05, atol=0)
    missed = (upper < true).float().mean()
    assert missed <= 0.15, f"{missed:.3f} of the bounds are below the truth"
    assert (upper.mean(0) < 2 * true).all(), "a bound that is always large would hold, too"
