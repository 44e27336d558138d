"""sum_context and add_unread: kernels against plain formulas, references too, and both against poisoned memory."""

from __future__ import annotations

import pytest
import torch

from specattn_vllm.kernels import reference
from specattn_vllm.kernels.add_unread import add_unread
from specattn_vllm.kernels.sum_context import LONGEST, sum_context

SUM = pytest.mark.parametrize("op", [sum_context, reference.sum_context], ids=["kernel", "reference"])
ADD = pytest.mark.parametrize("op", [add_unread, reference.add_unread], ids=["kernel", "reference"])
BLOCK, SIZE = 16, 64


def ints(values, device, dtype=torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def cache_of(lens: list[int], heads: int, place, poisoned):
    """(cache, block table, [R] of keys and values [H, len, 2D]): blocks in any order, NaN wherever no position is."""
    device, dtype = place
    counts = [-(-n // BLOCK) for n in lens]
    cache = poisoned((sum(counts) + 2, heads, BLOCK, 2 * SIZE), dtype, device)
    table = torch.full((len(lens), max(counts, default=0) + 1), 2_000_000_000, dtype=torch.int32)
    free = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)).tolist()
    held = []
    for r, n in enumerate(lens):
        kv = torch.randn(heads, n, 2 * SIZE, generator=torch.Generator().manual_seed(r)).to(device, dtype)
        for b in range(counts[r]):
            table[r, b] = block = free.pop()
            part = kv[:, b * BLOCK : (b + 1) * BLOCK]
            cache[block, :, : part.shape[1]] = part
        held.append(kv)
    return cache, table.to(device), held


@SUM
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(
    ("lens", "before"),
    [
        ([1], [0]),
        ([40, 17, 33, 5], [0, 12, 33, 9]),  # new, begun, up to date, and shorter than what was summed
        ([LONGEST + 5, 2 * LONGEST + 1, LONGEST], [0, 7, 0]),
    ],
    ids=["one position", "at any stage", "more than a program takes"],
)
@pytest.mark.parametrize("longest", [LONGEST, LONGEST + 3, 3 * LONGEST], ids=["one", "two", "three"])
def test_sums_go_as_far_as_a_step_may(lens, before, longest, heads, op, place, poisoned):
    device, _ = place
    cache, table, held = cache_of(lens, heads, place, poisoned)
    slots = [len(lens) + 1 - r for r in range(len(lens))]
    sums = poisoned((len(lens) + 3, heads, 2 * SIZE), torch.float32, device)
    summed = torch.full((len(lens) + 3, heads), 77, dtype=torch.int32, device=device)
    for r, done in enumerate(before):
        summed[slots[r]] = done
        if done:
            sums[slots[r]] = held[r][:, :done].float().sum(1)
    untouched = sums.clone()
    # The last row is padding, whatever its length says.
    rows = ints([*slots, -1], device, torch.int64)
    op(cache, torch.cat((table, table[:1])), rows, ints([*lens, 9], device), sums, summed, longest)
    for r, (length, done) in enumerate(zip(lens, before, strict=True)):
        end = max(min(length, done + longest), done)
        assert summed[slots[r]].tolist() == [end] * heads
        if end > done:
            wanted = held[r][:, :end].double().sum(1).float()
            torch.testing.assert_close(sums[slots[r]], wanted, rtol=1e-4, atol=1e-3)
        else:
            assert torch.equal(sums[slots[r]].nan_to_num(), untouched[slots[r]].nan_to_num())
    others = [z for z in range(len(lens) + 3) if z not in slots]
    assert sums[others].isnan().all()
    assert (summed[others] == 77).all()


def case(groups: int, heads: int, group: int, place, poisoned) -> dict:
    """Rows: some of it read, all of it, padding, nothing summed yet, no query. No sum is to be taken further."""
    device, dtype = place
    lens, read = [40, 30, 9, 25, 300], [12, 30, 3, 5, 7]
    queries = [3, 2, 1, 1, 0]
    starts = [0]
    for n in queries:
        starts.append(starts[-1] + n)
    gen = torch.Generator().manual_seed(2)
    tokens, query_heads = starts[-1] + 2, heads * group
    kept = torch.tensor([[n + (g if n != 30 else 0) for g in range(groups)] for n in read], dtype=torch.int32)
    sums = poisoned((7, heads, 2 * SIZE), torch.float32, device)
    summed = torch.full((7, heads), 50, dtype=torch.int32, device=device)
    slots = [5, 1, -1, 0, 3]
    for slot in (5, 1, 3):
        sums[slot] = 50 * torch.randn(heads, 2 * SIZE, generator=gen).to(device)
    summed[0] = 0
    query = poisoned((tokens, query_heads, SIZE + 8), dtype, device)[..., :SIZE]
    out = poisoned((tokens, query_heads, SIZE), dtype, device)
    lse = poisoned((tokens, query_heads), torch.float32, device)
    live = starts[-1]
    query[:live] = torch.randn(live, query_heads, SIZE, generator=gen).to(device, dtype)
    out[:live] = torch.randn(live, query_heads, SIZE, generator=gen).to(device, dtype)
    lse[:live] = 2 + torch.rand(live, query_heads, generator=gen).to(device)
    return {
        "query": query, "out": out, "lse": lse,
        "kv_cache": poisoned((2, heads, BLOCK, 2 * SIZE), dtype, device),
        "block_table": torch.full((5, 3), 2_000_000_000, dtype=torch.int32, device=device),
        "lens": ints([50, 20, 60, 0, 50], device), "seq_lens": ints(lens, device), "kept": kept.to(device),
        "slots": ints(slots, device, torch.int64), "sums": sums, "summed": summed,
        "query_start_loc": ints(starts, device), "scale": SIZE**-0.5, "max_query_len": 3,
    }  # fmt: skip


@ADD
@pytest.mark.parametrize(("heads", "group"), [(1, 1), (2, 3), (2, 4), (1, 16)])
@pytest.mark.parametrize("per_head", [False, True])
def test_the_mean_weighs_as_much_as_the_tokens_it_stands_for(per_head, heads, group, op, place, poisoned, close):
    given = case(heads if per_head else 1, heads, group, place, poisoned)
    before, sums, summed = (given[name].clone() for name in ("out", "sums", "summed"))
    op(**given)
    assert torch.equal(given["sums"].nan_to_num(), sums.nan_to_num()) and torch.equal(given["summed"], summed)
    starts = given["query_start_loc"].tolist()
    changed = range(starts[0], starts[1])  # of the first row alone
    for t in changed:
        for h in range(heads * group):
            kv = h // group
            key, value = (given["sums"][5, kv] / 50).split(SIZE)
            unread = 40 - int(given["kept"][0, kv if per_head else 0])
            # So many tokens more in a softmax of known norm.
            added = unread * torch.exp(given["query"][t, h].float() @ key * given["scale"])
            norm = torch.exp(given["lse"][t, h])
            wanted = (norm * before[t, h].float() + added * value) / (norm + added)
            close("out", given["out"][t, h], wanted.to(place[1]), place[1])
    rest = [t for t in range(len(before)) if t not in changed]
    assert torch.equal(given["out"][rest].nan_to_num(), before[rest].nan_to_num())


@ADD
@pytest.mark.parametrize("before", [[0, 12, 30, 3], [17, 17, 17, 0]], ids=["at any stage", "a few more"])
def test_sums_are_taken_further_first(before, op, place, poisoned, close):
    """As by `sum_context`, and attention is corrected by what they are then."""
    device, dtype = place
    # Of the second row everything was read: its sums are taken further all the same.
    lens, read, queries, heads = [20, 18, 30, LONGEST + 9], [5, 21, 8, 100], [2, 3, 1, 2], 2
    cache, table, held = cache_of(lens, heads, place, poisoned)
    gen = torch.Generator().manual_seed(5)
    starts = torch.tensor([0, *queries]).cumsum(0).int().to(device)
    query, out = (torch.randn(8, 4, SIZE, generator=gen).to(device, dtype) for _ in range(2))
    sums = poisoned((6, heads, 2 * SIZE), torch.float32, device)
    summed = torch.zeros((6, heads), dtype=torch.int32, device=device)
    slots = ints([3, 0, 5, 1], device, torch.int64)
    for slot, kv, done in zip(slots.tolist(), held, before, strict=True):
        summed[slot] = done
        if done:
            sums[slot] = kv[:, :done].float().sum(1)
    # The last few tokens are those of the verification.
    seq_lens = ints([n + q for n, q in zip(lens, queries, strict=True)], device)
    rest = (seq_lens, ints([[n] for n in read], device), slots)
    then = [sums.clone(), summed.clone()]
    sum_context(cache, table, slots, ints(lens, device), *then)
    lse = torch.rand(8, 4, generator=gen).to(device)
    wanted = out.clone()
    nothing = torch.zeros_like(ints(lens, device))
    reference.add_unread(query, wanted, lse, cache, table, nothing, *rest, *then, starts, 0.1, 3)
    op(query, out, lse, cache, table, ints(lens, device), *rest, sums, summed, starts, 0.1, 3)
    assert torch.equal(summed, then[1])
    assert summed[1].tolist() == [min(LONGEST + 9, before[3] + LONGEST)] * heads
    torch.testing.assert_close(sums, then[0], rtol=1e-4, atol=1e-3, equal_nan=True)
    close("out", out, wanted, dtype)


def test_one_mean_for_equal_tokens_is_exact(place, poisoned, close):
    """Where all tokens that were left out are alike, nothing is lost."""
    device, dtype = place
    gen = torch.Generator().manual_seed(4)
    query = torch.randn(1, 2, SIZE, generator=gen).to(device, dtype)
    keys, values = (torch.randn(30, SIZE, generator=gen).to(device, dtype) for _ in range(2))
    keys[10:], values[10:] = keys[10], values[10]
    logits = query.float() @ keys.float().T * 0.125
    read = logits[..., :10]
    out = (read.softmax(-1) @ values[:10].float()).to(dtype)
    # The mean of those that were left out, as if only they had been summed.
    sums = torch.cat((keys[10], values[10])).float().view(1, 1, -1) * 20
    cache, table = poisoned((1, 1, BLOCK, 2 * SIZE), dtype, device), ints([[0]], device)
    add_unread(
        query, out, read.logsumexp(-1), cache, table, ints([0], device), ints([30], device), ints([[10]], device),
        ints([0], device, torch.int64), sums, ints([[20]], device), ints([0, 1], device), 0.125, 1,
    )  # fmt: skip
    close("out", out, (logits.softmax(-1) @ values.float()).to(dtype), dtype)


@SUM
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lens": torch.zeros(3, dtype=torch.int32)}, r"lens: got shape \(3,\)"),
        ({"slots": torch.zeros(2, dtype=torch.int32)}, "slots: got torch.int32"),
        ({"sums": torch.zeros(4, 3, 128)}, r"sums: got shape \(4, 3, 128\)"),
        ({"summed": torch.zeros(4, 2)}, "summed: got torch.float32"),
        ({"longest": 0}, "longest: got 0, wanted at least 1"),
    ],
    ids=["lens", "slots", "sums", "summed", "longest"],
)
def test_sum_refuses(change, message, op):
    good = {
        "kv_cache": torch.zeros(3, 2, 16, 128), "block_table": torch.zeros(2, 1, dtype=torch.int32),
        "slots": torch.zeros(2, dtype=torch.int64), "lens": torch.zeros(2, dtype=torch.int32),
        "sums": torch.zeros(4, 2, 128), "summed": torch.zeros(4, 2, dtype=torch.int32),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        op(**{**good, **change})


@ADD
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lse": torch.zeros(2, 3)}, r"lse: got shape \(2, 3\)"),
        ({"kept": torch.zeros(1, 3, dtype=torch.int32)}, "kept: got 3 groups, wanted 1 or 2"),
        ({"sums": torch.zeros(4, 3, 128)}, r"sums: got shape \(4, 3, 128\)"),
        ({"kv_cache": torch.zeros(1, 2, 16, 64), "sums": torch.zeros(4, 2, 64)}, "kv_cache: got rows of 64"),
        ({"kv_cache": torch.zeros(1, 3, 16, 128), "sums": torch.zeros(4, 3, 128),
          "summed": torch.zeros(4, 3, dtype=torch.int32)}, "kv_cache: got 3 heads for 4 query heads"),
        ({"lens": torch.zeros(3, dtype=torch.int32)}, r"lens: got shape \(3,\)"),
        ({"max_query_len": 0}, "max_query_len: got 0"),
    ],
    ids=["lse", "kept", "sums", "width", "heads", "lens", "longest"],
)  # fmt: skip
def test_add_refuses(change, message, op):
    good = {
        "query": torch.zeros(2, 4, 64), "out": torch.zeros(2, 4, 64), "lse": torch.zeros(2, 4),
        "kv_cache": torch.zeros(1, 2, 16, 128), "block_table": torch.zeros(1, 1, dtype=torch.int32),
        "lens": torch.zeros(1, dtype=torch.int32),
        "seq_lens": torch.zeros(1, dtype=torch.int32), "kept": torch.zeros(1, 1, dtype=torch.int32),
        "slots": torch.zeros(1, dtype=torch.int64), "sums": torch.zeros(4, 2, 128),
        "summed": torch.zeros(4, 2, dtype=torch.int32), "query_start_loc": torch.zeros(2, dtype=torch.int32),
        "scale": 0.125, "max_query_len": 2,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        op(**{**good, **change})
