"""The guarantee's sample of any scores, and its bound for any keys, queries and logsumexps.

Scores are drawn with ties and with heads of one score alone. Histograms, cuts and starts are made from them, as the
contract of `sample_unread` says; others cannot occur.
"""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specattn_vllm.kernels.guarantee import reference
from specattn_vllm.kernels.guarantee.bound import bound_lost
from specattn_vllm.kernels.guarantee.sample import sample_unread
from specattn_vllm.kernels.sketch import reference as sketch
from specattn_vllm.kernels.sketch.contracts import BINS, CHUNK, Budget

CONTEXTS = st.sampled_from([-1, 0, 1, 17, 70, 300, 2047, 2048, 2049, 4100])  # -1: a padded row
BUDGETS = st.builds(
    Budget,
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    min_tokens=st.sampled_from([0, 1, 128]),
    sink=st.sampled_from([0, 4, 2**31 - 1]),
    recent=st.sampled_from([0, 64]),
    shared=st.sampled_from(["heads", "none"]),
)
HEADS, DRAWS = 2, 32


@st.composite
def batches(draw):
    contexts = draw(st.lists(CONTEXTS, min_size=1, max_size=3))
    queries = [draw(st.sampled_from([1, 1, 4])) if context >= 0 else 0 for context in contexts]
    width = -(-max(1, *(c + q for c, q in zip(contexts, queries, strict=True))) // 64) * 64
    scores = torch.full((len(contexts), HEADS, width), 201, dtype=torch.uint8)
    for row in scores.flatten(0, 1):
        few = draw(st.lists(st.integers(0, 255), min_size=1, max_size=3))
        row.copy_(torch.tensor((few * (width // len(few) + 1))[:width], dtype=torch.uint8))
    return contexts, queries, scores


def prepared(contexts, queries, scores, budget, dense):
    """Arguments of `sample_unread` before the layer."""
    rows, _, width = scores.shape
    histogram = torch.zeros((rows, HEADS, BINS), dtype=torch.int32)
    chunks = torch.zeros((rows, HEADS, -(-width // CHUNK), BINS), dtype=torch.int16)
    for r, context in enumerate(contexts):
        p = torch.arange(max(context, 0))
        free = (p >= budget.sink) & (p < context - budget.recent)
        for h in range(HEADS):
            counted = scores[r, h, : len(p)][free].long()
            histogram[r, h] = torch.bincount(counted, minlength=BINS).int()
            for c in range(chunks.shape[2]):
                part = scores[r, h, : len(p)][free & (p // CHUNK == c)].long()
                chunks[r, h, c] = torch.bincount(part, minlength=BINS).short()
    starts_of = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0).int()
    lens = torch.tensor([max(c, 0) + q for c, q in zip(contexts, queries, strict=True)], dtype=torch.int32)
    cuts = torch.full((rows, HEADS, 2), -77, dtype=torch.int32)
    starts = torch.full((rows, HEADS, chunks.shape[2], 2), -77, dtype=torch.int32)
    slots = torch.arange(rows, dtype=torch.int32)
    carried = torch.zeros((rows + 1, BINS + 2), dtype=torch.int32), torch.full((rows + 1, 2), -1, dtype=torch.int32)
    sketch.cut_scores(histogram, chunks, starts_of, lens, dense, scores, slots, *carried, budget, cuts, starts)
    return scores, histogram, chunks, cuts, starts, starts_of, lens, budget.sink, budget.recent


@settings(max_examples=30)
@given(batch=batches(), budget=BUDGETS, layer=st.integers(0, 80), data=st.data())
def test_any_scores_are_sampled(device, batch, budget, layer, data):
    contexts, queries, scores = batch
    dense = torch.tensor([data.draw(st.sampled_from([0, 0, 1])) for _ in contexts], dtype=torch.int32)
    arguments = prepared(contexts, queries, scores, budget, dense)
    found = []
    for op, where in ((sample_unread, device), (reference.sample_unread, torch.device("cpu"))):
        positions = torch.full((len(contexts), HEADS, DRAWS), -77, dtype=torch.int32, device=where)
        worth = torch.full(positions.shape, torch.nan, device=where)
        op(*(a.to(where) if isinstance(a, torch.Tensor) else a for a in arguments), layer, positions, worth)
        found.append((positions.cpu(), worth.cpu()))
    (positions, worth), (wanted, its) = found
    assert torch.equal(positions, wanted)
    torch.testing.assert_close(worth[wanted >= 0], its[wanted >= 0], rtol=1e-6, atol=0)
    for r, context in enumerate(contexts):
        for h in range(HEADS):
            threshold, skip = arguments[3][r, h].tolist()
            bins = scores[r, h, : max(context, 0)].long()
            left = reference.unread_of(bins, threshold, skip, budget.sink, budget.recent).nonzero().flatten()
            mine = positions[r, h].long()
            if threshold < 0 or not len(left):
                assert (mine == -1).all()
            else:
                assert torch.isin(mine, left).all() and (worth[r, h] >= 1 - 1e-6).all()


@settings(max_examples=40)
@given(
    data=st.data(), queries=st.lists(st.sampled_from([0, 1, 4]), min_size=1, max_size=2), ratio=st.sampled_from([1, 3])
)
def test_any_numbers_are_bounded(device, paged, any_numbers, data, queries, ratio):
    """Row 0 has keys, queries and logsumexps of any kind. Rows without queries are padded: they have no draws."""
    queries = [data.draw(st.sampled_from([1, 4])), *queries]
    lens, size = [70 + q for q in queries], 64
    plain, changed = (paged(lens, HEADS, size, 16, "LBNHC", device, torch.float32) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    tokens = sum(queries) + 2
    query = torch.randn(tokens, HEADS * ratio, size, generator=generator)
    lse = 5 + torch.randn(tokens, HEADS * ratio, generator=generator)
    positions = torch.randint(0, 70, (len(queries), HEADS, DRAWS), generator=generator).int().sort(-1).values
    positions[-1, -1] = -1  # nothing is unread
    positions[torch.tensor(queries) == 0] = -1
    worth = 1 + 50 * torch.rand(positions.shape, generator=generator)
    starts = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0).int()
    n = queries[0]
    strange = query.clone(), lse.clone()
    strange[0][:n] = any_numbers(data, (n, HEADS * ratio, size))
    strange[1][:n] = any_numbers(data, (n, HEADS * ratio))
    keys = any_numbers(data, (HEADS, 70, size))
    for i, block in enumerate(changed.block_table[0, :5].tolist()):
        part = keys[:, i * 16 : (i + 1) * 16]
        changed.kv_cache[block, :, : part.shape[1], :size] = part.to(device)
    results = []
    for op, cache, (q, read) in (
        (bound_lost, plain, (query, lse)),
        (bound_lost, changed, strange),
        (reference.bound_lost, changed, strange),
    ):
        lost = torch.full(positions.shape[:2], torch.nan, device=device)
        tables = cache.block_table, starts.to(device), positions.to(device), worth.to(device)
        op(q.to(device), cache.kv_cache, *tables, read.to(device), size**-0.5, 1.64, max(1, *queries), lost)
        results.append(lost.cpu())
    alone, got, want = results
    assert torch.equal(got[1:], alone[1:]), "others changed"
    assert ((got >= 0) & (got <= 1)).all()
    for h in range(HEADS):
        mine = slice(h * ratio, (h + 1) * ratio)
        k, q, read = keys[h, positions[0, h].long()], strange[0][:n, mine], strange[1][:n, mine]
        if k.isnan().any() or q.isnan().any() or read.isnan().any():
            assert got[0, h] == 1, "a bound that is no number holds"
        elif torch.einsum("nhd,kd->nhk", q.double().abs(), k.double().abs()).max() < 100 and read.abs().max() < 30:
            torch.testing.assert_close(got[0, h], want[0, h], rtol=2e-3, atol=1e-4)
