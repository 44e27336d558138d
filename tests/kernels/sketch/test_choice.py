"""Queries, scores, cuts and pages: kernels against references, and references against plain attention."""

from __future__ import annotations

import pytest
import torch

from specattn_vllm.kernels.sketch import reference
from specattn_vllm.kernels.sketch.contracts import BINS, LOWEST, MAX_SAMPLE, PER_NAT, Budget, sampled_tokens
from specattn_vllm.kernels.sketch.cuts import carry_thresholds, cut_scores
from specattn_vllm.kernels.sketch.pages import list_pages
from specattn_vllm.kernels.sketch.queries import prepare_queries
from specattn_vllm.kernels.sketch.scores import score_tokens

# lens, q_lens, KV heads, query heads each, head size, bits, block size, layout, dense rows
BATCHES = [
    pytest.param(([3000, 130, 0, 70, 2500], [6, 6, 0, 3, 1], 2, 4, 128, 2, 16, "LBNHC", (3,)), id="ragged-128"),
    pytest.param(([1500, 2049 + 5], [5, 5], 3, 3, 64, 2, 32, "LBHNC", ()), id="chunk-edge-64"),
    pytest.param(([400, 2, 1], [1, 1, 1], 1, 1, 64, 1, 16, "LBNHC", ()), id="one-row-1-bit"),
    pytest.param(([700, 900], [4, 2], 2, 2, 128, 4, 16, "LBHNC", ()), id="4-bits"),
    pytest.param(([600], [6], 1, 16, 128, 2, 16, "LBNHC", ()), id="gqa-16"),
    pytest.param(([500, 300], [3, 1], 2, 2, 64, 2, 144, "LBNHC", ()), id="block-144"),
    pytest.param(([500, 300], [3, 3], 2, 1, 256, 2, 16, "LBNHC", (1,)), id="head-256"),
    pytest.param(([500, 300], [3, 3], 2, 2, 96, 2, 16, "LBNHC", ()), id="head-96"),
    pytest.param(([200], [3], 1, 2, 96, 4, 16, "LBHNC", ()), id="head-96-4-bits"),
    pytest.param(([200], [3], 1, 2, 192, 1, 16, "LBHNC", ()), id="head-192-1-bit"),
]
BUDGETS = [
    Budget(0.1),
    Budget(0.1, shared="none"),
    Budget(0.1, shared="layers"),
    Budget(0.25, top_p=0.9),
    Budget(1.0, top_p=0.5),
    Budget(0.03, min_tokens=70),
    Budget(0.5, max_tokens=90, min_tokens=80),
    Budget(0.1, sink=0, recent=0, min_tokens=0),
    Budget(1.0),
    Budget(0.1, sink=2**31 - 1, recent=2**31 - 1),
]


# The last of a row's own tokens that were rejected drafts.
@pytest.mark.parametrize(("batch", "rejected"), [(BATCHES[0].values[0], 2), *((b.values[0], 0) for b in BATCHES)])
def test_kernels_do_what_the_references_do(place, sketched, prepared, scored, selected, batch, rejected):
    device, dtype = place
    if device.type == "cuda" and dtype == torch.float32 and batch[4] >= 192:
        pytest.skip("products of 256 x 256 float32 do not fit in a GPU's shared memory")
    data = sketched(*batch[:8], device, dtype, dense=batch[8], rejected=rejected)
    got, want = prepared(prepare_queries, data), prepared(reference.prepare_queries, data)
    assert (got[0] != want[0]).float().mean() < 1e-3  # a query on the border between two levels
    torch.testing.assert_close(got[1], want[1], rtol=2e-3, atol=2e-3, equal_nan=True)
    assert torch.equal(got[2], want[2])
    packed, factors, _ = want
    got, want = scored(score_tokens, data, packed, factors), scored(reference.score_tokens, data, packed, factors)
    apart = (got[0].int() - want[0].int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 1e-3  # a score on the border between two bins
    assert int((got[1] - want[1]).abs().sum()) <= 2 * int((apart > 0).sum())
    for budget in BUDGETS:
        scores, histogram, chunks = scored(reference.score_tokens, data, packed, factors, budget.sink, budget.recent)
        arguments = (data, scores, histogram, chunks, budget)
        ours, theirs = (
            selected(cut_scores, list_pages, *arguments),
            selected(reference.cut_scores, reference.list_pages, *arguments),
        )
        if budget.top_p is not None:
            # Sums of weights in another order: a token more or less.
            assert (ours[3] - theirs[3]).abs().max() <= 1
            continue
        for mine, its in zip(ours, theirs, strict=True):
            assert torch.equal(mine, its), budget


def test_scores_are_logarithms_of_attention_weights(sketched, prepared, scored):
    """4 bits of queries' true attention: the largest weight over the rows, from keys that are nearly exact."""
    data = sketched([900], [4], 2, 3, 128, 4, 16, "LBNHC", torch.device("cpu"), torch.float32)
    packed, factors, _ = prepared(reference.prepare_queries, data)
    scores, _, _ = scored(reference.score_tokens, data, packed, factors)
    context = data.context(0)
    p = torch.arange(context)
    table = data.block_table[0]
    # What a code stands for, turned back: the tests of encoding say how near that is to the key.
    codes = reference.unpack(data.codes.transpose(1, 2)[table[p // 16].long(), p % 16], 4).float()
    scales = data.scales.transpose(1, 2)[table[p // 16].long(), p % 16].float()
    keys = (2 * codes - 15) * scales[..., None]
    query = (data.query[:4] @ data.rotation / 128**0.5).unflatten(1, (2, 3))
    logits = torch.einsum("nhgd,thd->hngt", query, keys) / 128**0.5
    weights = logits.softmax(-1).log().flatten(1, 2).amax(1)
    bins = ((weights - LOWEST) * PER_NAT).floor().clamp(0, BINS - 1)
    # 512 of 900 tokens estimate the sums, and queries have 8 bits.
    assert (scores[0, :, :context].float() - bins).abs().mean() < 0.5 * PER_NAT


def test_the_most_attended_tokens_are_read(sketched, prepared, scored, selected):
    data = sketched([1100, 1100], [2, 2], 2, 2, 64, 2, 16, "LBNHC", torch.device("cpu"), torch.float32)
    packed, factors, _ = prepared(reference.prepare_queries, data)
    scores, histogram, chunks = scored(reference.score_tokens, data, packed, factors)
    budget = Budget(0.1)
    _, _, table, kept = selected(reference.cut_scores, reference.list_pages, data, scores, histogram, chunks, budget)
    # The mean of both heads is the budget, and the step's own tokens come on top.
    assert kept.sum(1).tolist() == [2 * (128 + 2)] * 2
    block, head, token = data.page_strides
    for r in range(2):
        for h in range(2):
            pages = table[r, h, : kept[r, h]].tolist()
            where = {int(data.block_table[r, p // 16]) * block + p % 16 * token + h * head: p for p in range(1100)}
            read = [where[page] for page in pages]
            assert read == sorted(read)
            assert {0, 1, 2, 3, *range(1098 - 64, 1100)} <= set(read)
            left = [int(scores[r, h, p]) for p in range(4, 1098 - 64) if p not in set(read)]
            assert max(left) <= min(int(scores[r, h, p]) for p in read if 4 <= p < 1098 - 64)


@pytest.mark.parametrize("triton", [True, False], ids=["kernels", "references"])
def test_layers_share_by_what_the_last_step_needed(place, sketched, prepared, scored, selected, new_requests, triton):
    """Two layers, one of which attends to little: it reads less, and both together what they may."""
    carry, cut, pages = (
        (carry_thresholds, cut_scores, list_pages)
        if triton
        else (reference.carry_thresholds, reference.cut_scores, reference.list_pages)
    )
    device, dtype = place
    data = sketched([2300, 1100, 0, 60], [2, 2, 2, 1], 2, 2, 64, 2, 16, "LBNHC", device, dtype)
    packed, factors, _ = prepared(reference.prepare_queries, data)
    layers = []
    for shift in (0.0, 1.5):
        moved = factors.clone()
        moved[:, :, 2] += shift
        layers.append(scored(reference.score_tokens, data, packed, moved))
    budget = Budget(0.1, shared="layers", min_tokens=90)
    carried = slots, totals, thresholds = new_requests(4, device)
    slots[3] = -1
    kept = []
    for _ in range(3):
        carry(*data.step[:2], slots, totals, thresholds, budget)
        kept.append(torch.stack([selected(cut, pages, data, *layer, budget, carried=carried)[3] for layer in layers]))
    first, second, third = (step.float() for step in kept)
    wanted = torch.tensor([230.0 + 2, 110.0 + 2], device=device)
    # A first step shares by heads.
    torch.testing.assert_close(first[:, :2].mean(2), wanted.expand(2, 2), rtol=0.01, atol=1)
    for step in (second, third):
        assert (step[0, :2].sum(1) > 1.2 * step[1, :2].sum(1)).all()
        torch.testing.assert_close(step[:, 0].mean(), wanted[0], rtol=0.02, atol=2)
        assert (step[:, :2] >= 90 + 2).all()
    # What the floor adds is taken from the rest a step later.
    torch.testing.assert_close(third[:, 1].mean(), wanted[1], rtol=0.02, atol=2)
    assert (third[:, 2] == 0).all()
    assert (third[:, 3] == 60).all()
    # A request that leaves its slot leaves nothing: its totals are zeros again, and the next one shares by heads.
    totals.zero_()
    carry(*data.step[:2], slots, totals, thresholds, budget)
    assert (thresholds[slots[:2].long(), 0] == -1).all()


def test_carried_thresholds_are_the_references(place, new_requests):
    device, _ = place
    generator = torch.Generator().manual_seed(1)
    starts, lens = torch.tensor([0, 1, 4, 5]), torch.tensor([4000, 900, 0])
    batch = starts.int().to(device), lens.int().to(device)
    slots, totals, thresholds = new_requests(3, device)
    totals[:, :BINS] = torch.randint(0, 400, (totals.shape[0], BINS), generator=generator).to(device)
    totals[:, BINS] = 60
    totals[:, BINS + 1] = torch.randint(0, 9000, (totals.shape[0],), generator=generator).to(device)
    totals[int(slots[1])] = 0
    for budget in (Budget(0.1, shared="layers"), Budget(1.0), Budget(0.001, min_tokens=0, sink=0, recent=0)):
        ours = (slots, totals.clone(), thresholds.clone())
        theirs = (slots, totals.clone(), thresholds.clone())
        carry_thresholds(*batch, *ours, budget)
        reference.carry_thresholds(*batch, *theirs, budget)
        for mine, its in zip(ours, theirs, strict=True):
            assert torch.equal(mine, its), budget


@pytest.mark.parametrize("ahead", [1, 5])
def test_pages_of_tokens_to_come_follow(place, sketched, prepared, scored, selected, ahead):
    """They stand behind what counts, in a table that is no wider than what may be kept; but for a padded row."""
    device, dtype = place
    data = sketched([2100, 0, 330], [3, 2, 1], 2, 2, 64, 2, 16, "LBHNC", device, dtype)
    packed, factors, _ = prepared(reference.prepare_queries, data)
    layer = scored(reference.score_tokens, data, packed, factors)
    for cut, pages in ((cut_scores, list_pages), (reference.cut_scores, reference.list_pages)):
        _, _, plain, kept = selected(cut, pages, data, *layer, Budget(0.1, shared="none"))
        _, _, more, same = selected(cut, pages, data, *layer, Budget(0.1, shared="none"), ahead=ahead)
        assert torch.equal(kept, same)
        block, head, token = data.page_strides
        for r, length in enumerate(data.seq_lens.tolist()):
            for h in range(2):
                n = int(kept[r, h])
                assert torch.equal(more[r, h, :n], plain[r, h, :n])
                p = torch.arange(length, length + (ahead if length else 0))
                there = data.block_table[r].cpu()[p // 16] * block + p % 16 * token + h * head
                assert more[r, h, n : n + len(p)].tolist() == there.tolist()
                assert (more[r, h, n + len(p) :] == -77).all()


def test_a_key_that_is_no_number_is_read(place, sketched, prepared, scored):
    """So that the row fails as it would densely, and not without a word."""
    device, dtype = place
    data = sketched([600], [2], 1, 2, 64, 2, 16, "LBNHC", device, dtype)
    packed, factors, _ = prepared(reference.prepare_queries, data)
    data.scales[int(data.block_table[0, 20]), 0, 3] = torch.nan
    for op in (score_tokens, reference.score_tokens):
        assert int(scored(op, data, packed, factors)[0][0, 0, 323]) == BINS - 1


def test_a_key_that_is_no_number_silences_no_query(place, sketched, prepared, scored):
    """It is in the sample from which a row's normaliser comes. Other tokens of the row are scored all the same."""
    device, dtype = place
    data = sketched([600], [2], 1, 2, 64, 2, 16, "LBNHC", device, dtype)
    data.scales[int(data.block_table[0, 0]), 0, 3] = torch.inf
    for prepare, score in ((prepare_queries, score_tokens), (reference.prepare_queries, reference.score_tokens)):
        packed, factors, _ = prepared(prepare, data)
        assert factors[0, 0, 2, :4].isfinite().all(), prepare
        assert len(scored(score, data, packed, factors)[0][0, 0, 16:500].unique()) > 1, score


def test_sampled_tokens_are_counted_as_they_are_drawn():
    contexts = [0, 1, 15, 16, 17, 31, 32, 300, 511, 512, 513, 528, 1000, 1024, 1025, 4095, 4096, 32762, 131066]
    counted = sampled_tokens(torch.tensor(contexts, dtype=torch.int32))
    assert counted.dtype == torch.int32
    assert counted.tolist() == [reference._sample(context, "cpu")[0].shape[0] for context in contexts]
    assert counted[:9].tolist() == contexts[:9]
    assert int(counted.max()) < MAX_SAMPLE + 32


def test_contexts_that_are_read_whole_are_not_scanned(place, sketched, prepared, scored):
    device, dtype = place
    data = sketched([600, 90], [2, 2], 1, 2, 64, 2, 16, "LBNHC", device, dtype)
    for op, scan in ((prepare_queries, score_tokens), (reference.prepare_queries, reference.score_tokens)):
        packed, factors, histogram = prepared(op, data, dense_up_to=100)
        assert (packed[1] == 77).all()
        assert (histogram == 0).all()
        scores, _, _ = scored(scan, data, packed, factors, dense_up_to=100)
        assert (scores[1] == 201).all()


@pytest.mark.parametrize("broken", ["histogram", "starts"])
def test_nothing_is_written_past_the_table(place, sketched, prepared, scored, new_requests, broken):
    device, dtype = place
    data = sketched([600], [2], 1, 2, 64, 2, 16, "LBNHC", device, dtype)
    packed, factors, _ = prepared(reference.prepare_queries, data)
    scores, histogram, chunks = scored(reference.score_tokens, data, packed, factors)
    wide = torch.full((1, 1, 700), -77, dtype=torch.int32, device=device)
    cuts = torch.zeros((1, 1, 2), dtype=torch.int32, device=device)
    starts = torch.zeros((1, 1, 1, 2), dtype=torch.int32, device=device)
    if broken == "histogram":
        carried = new_requests(1, device)
        cut_scores(histogram * 0, chunks * 0, *data.step[:3], scores, *carried, Budget(0.5), cuts, starts)
    else:
        cuts[..., 0], starts[...] = 3, 500
    kept = torch.zeros((1, 1), dtype=torch.int32, device=device)
    list_pages(
        scores, cuts, starts, data.step[0], data.step[1], data.step[3], 16, data.page_strides, 4, 64, 0,
        wide[..., :640], kept,
    )  # fmt: skip
    assert (wide[..., 640:] == -77).all()
    assert int(kept) <= 640


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "1, 2 or 4 bits"),
        ({"block_size": 8}, "a multiple of 16"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    size, tokens = 64, change.get("block_size", 16)
    code_bytes = size * change.get("bits", 2) // 8
    codes = torch.zeros(2, 1, tokens, code_bytes, dtype=torch.uint8)
    scales = torch.zeros(2, 1, tokens, dtype=torch.float16)
    starts, lens = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([20], dtype=torch.int32)
    for op in (prepare_queries, reference.prepare_queries):
        with pytest.raises(ValueError, match=message):
            op(
                torch.zeros(1, 1, size), starts, lens, lens * 0, lens, torch.zeros(1, 3, dtype=torch.int32), codes,
                scales, torch.ones(size, size), 1.0, 1, 0, torch.zeros(1, 1, 16, size, dtype=torch.int8),
                torch.zeros(1, 1, 3, 16), torch.zeros(1, 1, BINS, dtype=torch.int32),
            )  # fmt: skip
