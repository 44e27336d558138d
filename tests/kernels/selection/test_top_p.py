"""select_top_p: kernel and reference bit for bit against each other and against a plain-Python oracle."""

from __future__ import annotations

import random

import pytest
import torch

from specattn_vllm.kernels import reference
from specattn_vllm.kernels.selection import top_p
from specattn_vllm.kernels.selection.top_p import select_top_p

DEFAULTS = dict(top_p=0.6, min_tokens=0, max_tokens=-1, max_fraction=1.0, sink=0, recent=0)


def oracle(mass, top_p, min_tokens, max_tokens, max_fraction, sink, recent):
    """The rule read aloud, one token after another. ``mass`` is a list of floats; returns the set of positions."""
    n = len(mass)
    q = [int(m * 2**30) for m in mass]
    selected = {p for p in range(n) if p < sink or p >= n - recent}
    forced = len(selected)
    order = sorted((p for p in range(n) if p not in selected), key=lambda p: (q[p], p), reverse=True)
    upper = max((n * round(max_fraction * 65536) + 65535) // 65536, min_tokens)
    if max_tokens >= 0:
        upper = min(upper, max_tokens)
    upper = min(max(upper, forced), n)
    lower = min(min_tokens, upper)
    target = (sum(q) * round(top_p * 65536) + 65535) // 65536
    have = sum(q[p] for p in selected)
    for p in order:
        reached = top_p < 1 and have >= target
        if len(selected) >= upper or (reached and len(selected) >= lower):
            break
        selected.add(p)
        have += q[p]
    return selected


def unpack(bits_row, words=None):
    return {w * 32 + b for w, word in enumerate(bits_row.tolist()) for b in range(32) if word >> b & 1}


def rows_of(lists, device, width=None):
    """Rows padded with NaN, which a kernel that looks past the length would trip over."""
    width = width or max(map(len, lists))
    mass = torch.full((len(lists), width), torch.nan)
    for x, values in enumerate(lists):
        mass[x, : len(values)] = torch.tensor(values)
    lens = torch.tensor([len(v) for v in lists], dtype=torch.int32, device=device)
    return mass.to(device), lens


def run(op, mass, lens, poisoned, **options):
    bits = poisoned((mass.shape[0], -(-mass.shape[1] // 32)), torch.int32, mass.device)
    counts = poisoned((mass.shape[0],), torch.int32, mass.device)
    op(mass, lens, bits, counts, **{**DEFAULTS, **options})
    return bits, counts


def softmax_row(n, seed, sharpness=2.0):
    logits = sharpness * torch.randn(n, generator=torch.Generator().manual_seed(seed))
    return logits.softmax(-1).tolist()


def tied_row(n, seed, levels=4):
    """Few distinct values, exact in binary, so that most of the order is decided by position."""
    rng = random.Random(seed)
    values = [rng.randrange(levels) for _ in range(n)]
    scale = 2.0 ** -max(1, sum(values)).bit_length()
    return [v * scale for v in values]


def neighbours(smallest):
    """Values that differ in the last bits of a float32, in a row of more than 32 tokens."""
    return [smallest * (1 + k * 2.0**-23) for k in (3, 1, 4, 0, 2, 5)] + [0.0] * 40


def case(why, lists, **options):
    return pytest.param(lists, options, id=why)


CASES = [
    case("one token", [[1.0]]),
    case("around a word", [softmax_row(n, n) for n in (31, 32, 33)]),
    case("around four words", [softmax_row(n, n) for n in (127, 128, 129)]),
    case("around a step of 2048, uneven rows", [softmax_row(n, n) for n in (2047, 2049, 5)]),
    case("three steps", [softmax_row(4200, 1), tied_row(4200, 2)], top_p=0.9),
    case("padded row between others", [softmax_row(40, 1), [], softmax_row(7, 2)]),
    case("all padded", [[], []]),
    case("ties at the threshold: the most recent win", [[0.125] * 8], top_p=0.5),
    case("ties across a word", [[2.0**-6] * 50 + [2.0**-4] * 3], top_p=0.7),
    case("ties across a step", [[2.0**-12] * 4096], top_p=0.3),
    case("all-zero mass: forced tokens only", [[0.0] * 40, [0.0] * 3], sink=2, recent=3),
    case("all-zero mass, floor: the most recent", [[0.0] * 40], min_tokens=5),
    case("mass below the fixed point is zero", [[2.0**-31] * 40], top_p=0.99),
    case("one dominating token", [[0.0] * 30 + [1.0] + [0.0] * 30], top_p=0.999),
    case("a sum a little over 1", [[0.5, 0.25, 0.25 + 2.0**-22]], top_p=0.999),
    case("neighbours in float32, by weight", [neighbours(0.125), neighbours(2.0**-7)], top_p=0.39),
    case("neighbours in float32, by number", [neighbours(0.125), neighbours(2.0**-7)], top_p=1.0, max_tokens=2),
    case("top_p 1 keeps zero-mass tokens", [softmax_row(70, 3), [0.0] * 40], top_p=1.0),
    case("top_p just below 1 drops zero-mass tokens", [[0.5, 0.0, 0.5, 0.0]], top_p=0.99999),
    case("top_p 1 with a cap", [softmax_row(70, 3), tied_row(50, 1)], top_p=1.0, max_tokens=13),
    case("top_p 0: nothing but the floor", [softmax_row(50, 4)], top_p=0.0, min_tokens=3),
    case("floor adds zero-mass tokens", [[0.0] * 20 + [1.0] + [0.0] * 20], min_tokens=9),
    case("floor above the length", [softmax_row(10, 5), softmax_row(200, 6)], min_tokens=64),
    case("cap cuts inside ties", [tied_row(100, 7)], top_p=0.95, max_tokens=17),
    case("cap below the forced tokens", [softmax_row(100, 8)], max_tokens=3, sink=4, recent=5),
    case("cap 0", [softmax_row(30, 8)], max_tokens=0, min_tokens=4),
    case("floor above the cap: the cap wins", [softmax_row(100, 9)], min_tokens=50, max_tokens=20),
    case("fraction rounds up", [softmax_row(n, n) for n in (1, 9, 10, 11)], top_p=0.999, max_fraction=0.1),
    case("fraction 0", [softmax_row(20, 1)], max_fraction=0.0),
    case(
        "fraction below the floor: the floor wins",
        [softmax_row(n, n) for n in (6, 50, 90)],
        max_fraction=0.1,
        top_p=1.0,
        min_tokens=8,
    ),
    case("fraction below the floor, by mass", [softmax_row(90, 5)], max_fraction=0.05, top_p=0.9, min_tokens=8),
    case("sink and recent overlap in a short row", [softmax_row(6, 2), softmax_row(8, 3)], sink=4, recent=4),
    case("sink longer than the row", [softmax_row(6, 2)], sink=100),
    case("forced mass already enough", [[0.9] + [0.01] * 10], sink=1, top_p=0.8),
    case("all mass is forced", [[0.0] * 30 + [0.5, 0.5]], recent=2, top_p=0.9, min_tokens=4),
]


@pytest.mark.parametrize("lists, options", CASES)
def test_kernel_equals_reference(lists, options, device, poisoned):
    mass, lens = rows_of(lists, device, width=max(max(map(len, lists)), 1) + 37)
    bits, counts = run(select_top_p, mass, lens, poisoned, **options)
    want_bits, want_counts = run(reference.select_top_p, mass, lens, poisoned, **options)
    assert torch.equal(counts, want_counts)
    assert torch.equal(bits, want_bits)


@pytest.mark.parametrize("lists, options", [c for c in CASES if "step" not in c.id])
@pytest.mark.parametrize("tile", [64, 128])
def test_rows_too_long_for_registers(lists, options, tile, device, poisoned, monkeypatch):
    """The same cases with rows of 32 tokens resident, so that the others are read tile by tile."""
    monkeypatch.setattr(top_p, "RESIDENT", 32)
    monkeypatch.setattr(top_p, "TILE", tile)
    test_kernel_equals_reference(lists, options, device, poisoned)


@pytest.mark.parametrize(
    "options", [{"top_p": 0.9}, {"top_p": 1.0, "max_tokens": 30}, {"top_p": 0.7, "min_tokens": 90}]
)
@pytest.mark.parametrize("union", [False, True])
def test_rows_of_every_length_at_one_width(options, union, device, poisoned, monkeypatch):
    """Short, resident and long rows share a launch; what lies past a row's length is cleared, or stays for a union."""
    monkeypatch.setattr(top_p, "RESIDENT", 256)
    monkeypatch.setattr(top_p, "TILE", 128)
    lists = [softmax_row(n, n) for n in (1, 31, 32, 33, 255, 256, 257, 400, 700)] + [tied_row(n, n) for n in (250, 600)]
    mass, lens = rows_of(lists, device, width=1200)
    gen = torch.Generator().manual_seed(0)
    old = torch.randint(-(2**31), 2**31, (len(lists), 38), generator=gen).int().to(device)
    results = []
    for op in (select_top_p, reference.select_top_p):
        bits, counts = old.clone(), poisoned((len(lists),), torch.int32, device)
        op(mass, lens, bits, counts, **{**DEFAULTS, **options}, union=union)
        results.append((bits, counts))
    (bits, counts), (want_bits, want_counts) = results
    assert torch.equal(counts, want_counts)
    assert torch.equal(bits, want_bits)


@pytest.mark.parametrize(
    "options", [{"top_p": 0.9}, {"top_p": 1.0, "max_fraction": 0.1}, {"top_p": 0.9, "max_tokens": 99}]
)
def test_rows_of_a_long_context(options, device, poisoned):
    """Resident and streamed rows as the kernel is tuned, nothing made smaller."""
    test_kernel_equals_reference(
        [softmax_row(n, n) for n in (70_001, 32_769, 32_768, 4_000)], options, device, poisoned
    )


@pytest.mark.parametrize("lists, options", CASES)
def test_reference_equals_oracle(lists, options, poisoned):
    mass, lens = rows_of(lists, torch.device("cpu"), width=max(max(map(len, lists)), 1) + 37)
    bits, counts = run(reference.select_top_p, mass, lens, poisoned, **options)
    for x, n in enumerate(lens.tolist()):
        want = oracle(mass[x, :n].tolist(), **{**DEFAULTS, **options})
        assert unpack(bits[x]) == want
        assert counts[x] == len(want)


def random_problem(seed):
    rng = random.Random(seed)
    lists = []
    for _ in range(8):
        n = rng.choice([0, 1, 2, 5, 31, 32, 33, 64, 100])
        lists.append(softmax_row(n, rng.random().__hash__(), rng.choice([0.1, 2.0, 8.0])) if rng.random() < 0.5
                     else tied_row(n, rng.random(), rng.choice([2, 5])))  # fmt: skip
    options = dict(
        top_p=rng.choice([0.0, 0.1, 0.5, 0.9, 0.99, 1.0, rng.random()]),
        min_tokens=rng.choice([0, 0, 1, 7, 40]),
        max_tokens=rng.choice([-1, -1, 0, 5, 30]),
        max_fraction=rng.choice([1.0, 1.0, 0.5, rng.random()]),
        sink=rng.choice([0, 0, 1, 4]),
        recent=rng.choice([0, 0, 1, 8]),
    )
    return lists, options


@pytest.mark.parametrize("seed", range(60))
def test_reference_equals_oracle_at_random(seed, poisoned):
    test_reference_equals_oracle(*random_problem(seed), poisoned)


@pytest.mark.parametrize("seed", range(100, 120))
def test_kernel_equals_reference_at_random(seed, device, poisoned):
    test_kernel_equals_reference(*random_problem(seed), device, poisoned)


@pytest.mark.parametrize("seed", range(200, 215))
def test_long_rows_at_random(seed, device, poisoned, monkeypatch):
    test_rows_too_long_for_registers(*random_problem(seed), 64, device, poisoned, monkeypatch)


@pytest.mark.parametrize("op", [select_top_p, reference.select_top_p], ids=["kernel", "reference"])
def test_union(op, device, poisoned):
    """Bits that were there stay, past the length too; the count is that of the union."""
    lists = [softmax_row(40, 1), [], softmax_row(64, 2)]
    mass, lens = rows_of(lists, device, width=100)
    new, _ = run(reference.select_top_p, mass, lens, poisoned)
    old = torch.tensor([[5, -1, 0, 8], [0, 3, 0, 0], [-(2**31), 0, 0, 0]], dtype=torch.int32, device=device)
    bits, counts = old.clone(), poisoned((3,), torch.int32, device)
    op(mass, lens, bits, counts, **DEFAULTS, union=True)
    assert torch.equal(bits, old | new)
    assert counts.tolist() == [len(unpack(row)) for row in old | new]


def test_strided_rows(device, poisoned):
    """Rows of a wider buffer: one source and group of the [S, num_slots, G, W] store."""
    mass, lens = rows_of([softmax_row(90, 1), softmax_row(70, 2)], device, width=96)
    store = poisoned((2, 3, 3), torch.int32, device)
    counts = poisoned((2,), torch.int32, device)
    wide = poisoned((2, 200), torch.float32, device)
    wide[:, :96] = mass
    select_top_p(wide[:, :96], lens, store[:, 1], counts, **DEFAULTS)
    want, _ = run(reference.select_top_p, mass, lens, poisoned)
    assert torch.equal(store[:, 1], want)
    assert (store[:, 0] == -858993460).all() and (store[:, 2] == -858993460).all()


@pytest.mark.parametrize("op", [select_top_p, reference.select_top_p], ids=["kernel", "reference"])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": torch.zeros(1, 1, dtype=torch.int32)}, r"bits: got shape \(1, 1\), wanted shape \(1, 2\)"),
        ({"max_fraction": 1.5}, "max_fraction: got 1.5, wanted 0 to 1"),
        ({"max_tokens": -2}, "max_tokens: got -2"),
        ({"sink": -1}, "sink: got -1"),
        ({"lens": torch.ones(2, dtype=torch.int32)}, r"lens: got shape \(2,\), wanted shape \(1,\)"),
        ({"mass": torch.zeros(1, 40, dtype=torch.float16)}, "mass: got torch.float16"),
    ],
    ids=["words", "fraction", "cap", "sink", "lens", "dtype"],
)
def test_refuses(op, change, message):
    good = {
        "mass": torch.zeros(1, 40), "lens": torch.ones(1, dtype=torch.int32),
        "bits": torch.zeros(1, 2, dtype=torch.int32), "counts": torch.zeros(1, dtype=torch.int32), **DEFAULTS,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        op(**{**good, **change})
