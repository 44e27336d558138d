"""The operations around a step: kernel and reference equal to plain-Python oracles, number for number."""

from __future__ import annotations

import random

import pytest
import torch

from specattn_vllm.kernels import reference
from specattn_vllm.kernels.bookkeeping import kernels as bookkeeping
from specattn_vllm.kernels.bookkeeping.contracts import NO_SELECTION, READ_COUNTS, Round

OPS = pytest.mark.parametrize("ops", [bookkeeping, reference], ids=["kernel", "reference"])
POISON = -858993460
ROWS = pytest.mark.parametrize("rows", [0, 1, 5, 300])
SLOTS = 400


def put(values, dtype, device, behind: int = 0):
    """A tensor of values, with poison behind it."""
    poison = torch.nan if dtype.is_floating_point else POISON
    return torch.tensor([*values, *[poison] * behind], dtype=dtype, device=device)


def step(rows: int, seed: int = 0):
    """Rows of a step: (slots, query lengths, tokens before, prefilling), and what each slot of the store holds."""
    rng = random.Random(100 * rows + seed)
    slots = rng.sample(range(SLOTS), rows)
    slots = [-1 if rng.random() < 0.2 else slot for slot in slots]
    query = [0 if slot < 0 else rng.randint(1, 9) for slot in slots]
    computed = [0 if slot < 0 else rng.randint(1, 10**6) for slot in slots]
    prefilling = [rng.random() < 0.3 for _ in slots]
    held = [-1] * SLOTS
    for slot, n in zip(slots, computed, strict=True):
        if slot >= 0:
            held[slot] = rng.choice([n, n, n, n + 1, NO_SELECTION])
    return slots, query, computed, prefilling, held


def starts(query: list[int]) -> list[int]:
    return [sum(query[:r]) for r in range(len(query) + 1)]


# take_selections


@OPS
@ROWS
@pytest.mark.parametrize("nobody", [-1, 0, 7])
def test_selections_are_taken_and_cleared(ops, rows, nobody, device):
    slots, query, computed, prefilling, held = step(rows)
    # The last slot is nobody's; a padded row has 0 tokens and may claim to prefill.
    prefix_lens = put([*held, nobody], torch.int32, device)
    usable, stored = (put([POISON] * rows, torch.int32, device, behind=9) for _ in range(2))
    lens = [q + c for q, c in zip(query, computed, strict=True)]
    ops.take_selections(
        put(slots, torch.int64, device), put(starts(query), torch.int32, device), put(lens, torch.int32, device),
        torch.tensor(prefilling, dtype=torch.bool, device=device), prefix_lens, usable[:rows], stored[:rows],
    )  # fmt: skip
    after, want_usable, want_stored = [*held, nobody], [], []
    for slot, n, prefills in zip(slots, computed, prefilling, strict=True):
        want_stored.append(held[slot] if slot >= 0 else -1)
        want_usable.append(n if want_stored[-1] == n and not prefills else -1)
        if prefills and slot >= 0:
            after[slot] = -1
    assert stored.tolist() == want_stored + [POISON] * 9
    assert usable.tolist() == want_usable + [POISON] * 9
    assert prefix_lens.tolist() == after
    if rows == 300:
        assert len({*want_usable}) > 50 and -1 in want_usable and after != [*held, nobody]


# count_reads


def count(ops, slots, lens, prefilling, usable, stored, kept, layers_of, heads, layers, dense_layers, device):
    out = put([POISON] * (len(READ_COUNTS) + 2), torch.int64, device)
    ints = (put(v, torch.int32, device) for v in (usable, stored))
    ops.count_reads(
        put(slots, torch.int64, device), put(lens, torch.int32, device),
        torch.tensor(prefilling, dtype=torch.bool, device=device), *ints, kept,
        put(layers_of, torch.int64, device), heads, layers, dense_layers, out[1:-1],
    )  # fmt: skip
    assert out[0] == out[-1] == POISON
    return dict(zip(READ_COUNTS, out[1:-1].tolist(), strict=True))


@OPS
@ROWS
@pytest.mark.parametrize("sources, groups", [(1, 1), (3, 1), (36, 1), (5, 8), (0, 1)])
def test_what_verification_reads(ops, rows, sources, groups, device):
    rng = random.Random(rows)
    slots, query, computed, prefilling, held = step(rows, seed=1)
    lens = [q + c for q, c in zip(query, computed, strict=True)]
    stored = [held[slot] if slot >= 0 else -1 for slot in slots]
    verifies = [slot >= 0 and not prefills for slot, prefills in zip(slots, prefilling, strict=True)]
    usable = [n if v and s == n else -1 for v, s, n in zip(verifies, stored, computed, strict=True)]
    # A part of something larger, and poison wherever nothing is verified.
    buffer = torch.full((sources + 1, rows + 3, groups + 1), POISON, dtype=torch.int32)
    kept = buffer[1:, 2 : rows + 2, :groups]
    for r, n in enumerate(lens):
        if verifies[r]:
            kept[:, r] = torch.tensor([[rng.randint(0, n) for _ in range(groups)] for _ in range(sources)]).view(
                sources, groups
            )
    layers_of = [rng.randint(1, 4) for _ in range(sources)]
    heads, layers = 8, sum(layers_of) + 2
    got = count(
        ops, slots, lens, prefilling, usable, stored, buffer.to(device)[1:, 2 : rows + 2, :groups], layers_of, heads,
        layers, 2, device,
    )  # fmt: skip
    tokens = sum(n for n, v in zip(lens, verifies, strict=True) if v)
    read = sum(
        int(kept[s, r, h * groups // heads]) * layers_of[s]
        for s in range(sources)
        for r in range(rows)
        for h in range(heads)
        if verifies[r]
    )
    nothing = sum(v and s == NO_SELECTION for v, s in zip(verifies, stored, strict=True))
    sparse = sum(u != -1 for u in usable)
    assert got == {
        "sparse_rows": sparse,
        "no_selection_rows": nothing,
        "stale_rows": sum(verifies) - sparse - nothing,
        "kv_read": read + 2 * heads * tokens,
        "kv_full": layers * heads * tokens,
    }
    if rows == 300:
        assert len({sparse, nothing, got["stale_rows"], 0}) == 4
        assert sources == 0 or got["kv_full"] > 2**31


@OPS
def test_the_reads_of_one_row_exceed_32_bits(ops, device):
    kept = torch.full((2, 1, 1), 2**30, dtype=torch.int32, device=device)
    got = count(ops, [0], [2**31 - 1], [False], [5], [5], kept, [3, 4], 16, 8, 1, device)
    full = (2**31 - 1) * 16
    assert got == dict(zip(READ_COUNTS, (1, 0, 0, 2**30 * 16 * 7 + full, 8 * full), strict=True))


# count_sampled


@OPS
@ROWS
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("masked", [False, True])
def test_tokens_of_verified_rows_are_added(ops, rows, dtype, masked, device):
    rng = random.Random(rows)
    sampled = [rng.randint(0, 9) for _ in range(rows)]
    verified = [rng.random() < 0.6 for _ in range(rows)]
    total = put([POISON, 2**40, POISON], torch.int64, device)
    mask = torch.tensor(verified, dtype=torch.bool, device=device) if masked else None
    for _ in range(2):
        ops.count_sampled(put(sampled, dtype, device, behind=20)[:rows], mask, total[1:2])
    new = sum(n for n, counts in zip(sampled, verified, strict=True) if counts or not masked)
    assert total.tolist() == [POISON, 2**40 + 2 * new, POISON]


# load_round

HELD = Round(*[torch.int32, torch.int64] * 2, *[torch.int32] * 3, torch.float32, torch.int64)
QUERY = 3


def held_round(rows: int, slots: int, device) -> Round:
    """Where a round of up to so many rows lies, poisoned."""
    per = Round(*[rows * QUERY] * 2, *[rows] * 4, *[slots] * 3)
    buffers = Round(*(put([], dtype, device, behind=n + 1) for dtype, n in zip(HELD, per, strict=True)))
    # Not where its memory begins.
    return buffers._replace(
        **{name: getattr(buffers, name)[1:] for name in ("last_sampled", "temperature", "seeds")},
    )


def given_round(reqs: int, slots: int, counts: torch.dtype, device, behind: int = 4) -> Round:
    rng = random.Random(reqs)
    tokens = [rng.randint(1, 2**31 - 1) for _ in range(reqs * QUERY)]
    return Round(
        put(tokens, torch.int32, device, behind),
        put([t + 2**33 for t in tokens], torch.int64, device, behind),
        put([rng.randint(1, 10**6) for _ in range(reqs)], torch.int32, device, behind),
        put(rng.sample(range(reqs), reqs), torch.int64, device, behind),
        put([rng.randint(1, QUERY) for _ in range(reqs)], counts, device, behind),
        put([rng.randint(0, QUERY) for _ in range(reqs)], counts, device, behind),
        put([rng.randint(0, 2**31 - 1) for _ in range(slots)], torch.int64, device, behind),
        put([rng.random() for _ in range(slots)], torch.float32, device, behind),
        put([rng.randint(-(2**63), 2**63 - 1) for _ in range(slots)], torch.int64, device, behind),
    )


@OPS
@pytest.mark.parametrize("counts", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "reqs, rows, capacity, slots",
    [(0, 0, 2, 2), (0, 3, 4, 4), (1, 1, 1, 1), (1, 5, 8, 8), (5, 5, 5, 9), (290, 300, 310, 310), (2, 4, 400, 400)],
)
def test_a_round_is_loaded_and_padded(ops, reqs, rows, capacity, slots, counts, device):
    given, held = given_round(reqs, slots, counts, device), held_round(capacity, slots, device)
    ops.load_round(given, held, reqs, rows, QUERY)
    for name, source, target in zip(Round._fields, given, held, strict=True):
        if name in ("last_sampled", "temperature", "seeds"):
            assert target.tolist() == source[:slots].tolist(), name
            continue
        per_row = QUERY if name in ("input_ids", "positions") else 1
        want = source[: reqs * per_row].tolist()
        want += [-1 if name == "idx_mapping" else 0] * (rows - reqs) * per_row
        assert target.tolist() == want + [POISON] * (len(target) - len(want)), name


# Refusals


def good(op: str) -> dict:
    ints, longs = torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)
    rows = {"slots": longs, "seq_lens": ints, "prefilling": torch.zeros(3, dtype=torch.bool)}
    pair = {"usable": ints.clone(), "stored": ints.clone()}
    return {
        "take_selections": {
            **rows, **pair, "query_start_loc": torch.zeros(4, dtype=torch.int32), "prefix_lens": ints.clone(),
        },
        "count_reads": {
            **rows, **pair, "kept": torch.zeros(2, 3, 1, dtype=torch.int32), "layers_of": longs[:2], "heads": 4,
            "layers": 5, "dense_layers": 1, "out": torch.zeros(5, dtype=torch.int64),
        },
        "count_sampled": {"num_sampled": ints, "verified": rows["prefilling"], "total": longs[:1]},
        "start_clock": {"began": longs[:1]},
        "stop_clock": {"began": longs[:1], "times": 1, "total": longs[:1].clone()},
        "load_round": {
            "given": given_round(2, 5, torch.int32, "cpu", behind=0),
            "held": held_round(4, 5, torch.device("cpu")), "reqs": 2, "rows": 4, "query_len": QUERY,
        },
    }[op]  # fmt: skip


@OPS
@pytest.mark.parametrize(
    "op, change, message",
    [
        ("take_selections", {"slots": torch.zeros(3, dtype=torch.int32)}, "slots: got torch.int32, wanted torch.int64"),
        ("take_selections", {"slots": [1]}, "slots: got list, wanted a tensor"),
        ("take_selections", {"query_start_loc": torch.zeros(3).int()}, r"query_start_loc: got shape \(3,\)"),
        ("take_selections", {"usable": torch.zeros(6).int()[::2]}, "usable: got strides"),
        ("take_selections", {"prefilling": torch.zeros(3).int()}, "prefilling: got torch.int32, wanted torch.bool"),
        ("count_reads", {"kept": torch.zeros(2, 4, 1).int()}, r"kept: got shape \(2, 4, 1\)"),
        ("count_reads", {"heads": 3, "kept": torch.zeros(2, 3, 2).int()}, "kept: got 2 heads for 3 query heads"),
        ("count_reads", {"out": torch.zeros(4).long()}, r"out: got shape \(4,\)"),
        ("count_reads", {"dense_layers": 6}, "dense_layers: got 6, wanted 0 to 5"),
        ("count_reads", {"layers_of": torch.zeros(3).long()}, r"layers_of: got shape \(3,\)"),
        ("count_sampled", {"verified": torch.zeros(2, dtype=torch.bool)}, r"verified: got shape \(2,\)"),
        ("count_sampled", {"num_sampled": torch.zeros(3)}, "num_sampled: got torch.float32"),
        ("count_sampled", {"total": torch.zeros(2).long()}, r"total: got shape \(2,\)"),
        ("start_clock", {"began": torch.zeros(1)}, "began: got torch.float32"),
        ("stop_clock", {"total": torch.zeros(2).long()}, r"total: got shape \(2,\)"),
        ("stop_clock", {"times": 0}, "times: got 0, wanted at least 1"),
        ("load_round", {"reqs": 5}, "reqs: got 5, wanted 0 to the 4 rows"),
        ("load_round", {"reqs": 3}, r"input_ids: got shape \(6,\), wanted shape \('9 or more',\)"),
        ("load_round", {"rows": 6}, r"input_ids: got shape \(13,\), wanted shape \('18 or more',\)"),
    ],
)
def test_refuses(ops, op, change, message):
    getattr(reference, op)(**good(op))
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(**{**good(op), **change})


@OPS
def test_a_round_s_dtypes_are_checked_on_both_sides(ops):
    arguments = good("load_round")
    for side in ("given", "held"):
        for name in Round._fields:
            wrong = arguments[side]._replace(**{name: getattr(arguments[side], name).to(torch.float64)})
            with pytest.raises(ValueError, match=f"{name}: got torch.float64"):
                ops.load_round(**{**arguments, side: wrong})
