"""accumulate_mass: kernel against reference, reference against softmax."""

from __future__ import annotations

import pytest
import torch

from specattn_vllm.kernels import reference
from specattn_vllm.kernels.selection import accumulate_mass as module
from specattn_vllm.kernels.selection.accumulate_mass import accumulate_mass


def case(why, lens, query_heads, groups, width):
    return pytest.param((lens, query_heads, groups, width), id=why)


CASES = [
    case("one position", [1], 1, 1, 8),
    case("odd lengths, one group", [31, 32, 33], 4, 1, 33),
    case("a group per KV head", [127, 129], 8, 4, 160),
    case("a group per query head", [65], 4, 4, 65),
    case("padded row", [20, 0, 7], 4, 2, 24),
    case("around a step of 512", [511, 512, 513], 2, 1, 600),
    case("several steps in rows of whole vectors", [1030, 0, 517], 10, 1, 1040),
    case("many heads in a group", [40], 32, 1, 64),
    case("width no multiple of anything", [97, 3], 6, 3, 101),
]


def build(params, device, score_dtype, poisoned):
    """Scores with NaN tails; the logsumexp covers five more positions than lens where there are any."""
    lens, query_heads, _, width = params
    gen = torch.Generator().manual_seed(2)
    scores = poisoned((len(lens), query_heads, width), score_dtype, device)
    lse = torch.full((len(lens), query_heads), -torch.inf, device=device)
    for r, n in enumerate(lens):
        if n:
            made = min(n + 5, width)
            values = (3 * torch.randn(query_heads, made, generator=gen)).to(score_dtype)
            scores[r, :, :n] = values[:, :n].to(device)
            lse[r] = values.float().logsumexp(-1).to(device)
    return scores, lse, torch.tensor(lens, dtype=torch.int32, device=device)


@pytest.mark.parametrize("score_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("params", CASES)
def test_kernel_matches_reference(params, score_dtype, device, poisoned, close):
    """store, then add on the result."""
    scores, lse, lens = build(params, device, score_dtype, poisoned)
    mass = poisoned((len(params[0]), params[2], params[3]), torch.float32, device)
    want = mass.clone()
    weight = params[2] / params[1]
    for scale, combine in ((weight, "store"), (0.5 * weight, "add")):
        accumulate_mass(scores, lse, lens, mass, scale, combine)
        reference.accumulate_mass(scores, lse, lens, want, scale, combine)
        for r, n in enumerate(params[0]):
            close("mass", mass[r, :, :n], want[r, :, :n])
            assert mass[r, :, n:].isnan().all() and want[r, :, n:].isnan().all()


@pytest.mark.parametrize("width", [1100, 1104], ids=["any width", "whole vectors"])
def test_few_programs_walk_long_rows(width, device, poisoned, close, monkeypatch):
    """With one program per row instead of one per block, and lengths around the blocks it steps over."""
    monkeypatch.setattr(module, "PROGRAMS", 1)
    scores, lse, lens = build(([1024, 1100, 3, 1025], 2, 1, width), device, torch.bfloat16, poisoned)
    mass, want = (poisoned((4, 1, width), torch.float32, device) for _ in range(2))
    accumulate_mass(scores, lse, lens, mass, 0.5, "store")
    reference.accumulate_mass(scores, lse, lens, want, 0.5, "store")
    written = want.isfinite()
    close("mass", mass[written], want[written])
    assert torch.equal(mass.isfinite(), written)


LISTED = [
    # why, lens, kept, query heads, groups, width
    ("lists around a step of 512", [600, 700, 800], [511, 512, 513], 2, 1, 808),
    ("a row without a list between rows with one", [40, 50, 60], [7, -1, 33], 4, 2, 64),
    ("nothing listed, all listed", [20, 20], [0, 20], 4, 1, 21),
    ("padded rows", [0, 9, 0], [5, 4, -1], 4, 4, 16),
    ("many heads in a group", [40], [30], 24, 1, 41),
]


def build_listed(params, device, score_dtype, poisoned):
    """Lists with a few positions at lens and behind it, and columns behind the list that must not count."""
    lens, kept, query_heads, _, width = params
    scores, lse, _ = build(([width] * len(lens), query_heads, None, width), device, score_dtype, poisoned)
    gen = torch.Generator().manual_seed(4)
    positions = torch.full((len(lens), width), 1 << 30, dtype=torch.int32)
    for r, count in enumerate(kept):
        if count > 0:
            bound = width if count < width else count
            positions[r, :count] = torch.randperm(bound, generator=gen)[:count].sort().values.int()
    counts, lens = (torch.tensor(x, dtype=torch.int32, device=device) for x in (kept, lens))
    return scores, lse, lens, positions.to(device), counts


@pytest.mark.parametrize("params", [pytest.param(p[1:], id=p[0]) for p in LISTED])
def test_listed_kernel_matches_reference(params, device, poisoned, close):
    scores, lse, lens, positions, kept = build_listed(params, device, torch.bfloat16, poisoned)
    rows, groups, width = len(params[0]), params[3], params[4]
    mass = torch.rand((rows, groups, width), generator=torch.Generator().manual_seed(6)).to(device) * 0.01
    for r, n in enumerate(params[0]):
        mass[r, :, n:] = torch.nan
    want, before = mass.clone(), mass.clone()
    accumulate_mass(scores, lse, lens, mass, groups / params[2], "add", positions, kept)
    reference.accumulate_mass(scores, lse, lens, want, groups / params[2], "add", positions, kept)
    for r, n in enumerate(params[0]):
        close("mass", mass[r, :, :n], want[r, :, :n])
        assert mass[r, :, n:].isnan().all() and want[r, :, n:].isnan().all()
        listed = positions[r, : max(int(kept[r]), 0)].tolist() if kept[r] >= 0 else range(n)
        others = [p for p in range(n) if p not in set(listed)]
        assert torch.equal(mass[r][:, others], before[r][:, others])


@pytest.mark.parametrize("shift", [1, 5, 64])
@pytest.mark.parametrize("listed", [False, True], ids=["all", "listed"])
@pytest.mark.parametrize("params", [pytest.param(p[1:], id=p[0]) for p in LISTED])
def test_shifted_kernel_matches_reference(params, listed, shift, device, poisoned, close):
    scores, lse, lens, positions, kept = build_listed(params, device, torch.bfloat16, poisoned)
    lists = (positions, kept) if listed else ()
    mass = torch.rand((len(params[0]), params[3], params[4]), generator=torch.Generator().manual_seed(6)).to(device)
    for r, n in enumerate(params[0]):
        mass[r, :, n:] = torch.nan
    want, before = mass.clone(), mass.clone()
    accumulate_mass(scores, lse, lens, mass, params[3] / params[2], "add", *lists, shift=shift)
    reference.accumulate_mass(scores, lse, lens, want, params[3] / params[2], "add", *lists, shift=shift)
    for r, n in enumerate(params[0]):
        close("mass", mass[r, :, :n], want[r, :, :n])
        assert mass[r, :, n:].isnan().all() and want[r, :, n:].isnan().all()
        assert torch.equal(mass[r, :, : min(shift, n)], before[r, :, : min(shift, n)])


def test_shifted_column_goes_to_the_next_position(device):
    """By hand, with and without a list; the last column's position is behind the end."""
    scores, lse = torch.tensor([[[0.1, 0.2, 0.3, 9.0]]], device=device).log(), torch.zeros(1, 1, device=device)
    lens, positions, kept = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([3], [[0, 2]], [2]))
    for op in (accumulate_mass, reference.accumulate_mass):
        for lists, want in (((), [1, 1.1, 1.2, 1]), ((positions, kept), [1, 1.1, 1, 1])):
            mass = torch.ones(1, 1, 4, device=device)
            op(scores, lse, lens, mass, 1.0, "add", *lists, shift=1)
            assert mass.flatten().tolist() == pytest.approx(want)


def test_listed_column_goes_to_its_position(device):
    """By hand: three columns, of which the second belongs to position 3 and the third to one behind lens."""
    scores, lse = torch.tensor([[[0.0, 0.5, 9.0, 9.0, 9.0]]], device=device).log(), torch.zeros(1, 1, device=device)
    ints = [torch.tensor(x, dtype=torch.int32, device=device) for x in ([4], [[1, 3, 4]], [3])]
    for op in (accumulate_mass, reference.accumulate_mass):
        mass = torch.tensor([[[0.1, 0.1, 0.1, 0.1, 0.1]]], device=device)
        op(scores, lse, ints[0], mass, 1.0, "add", *ints[1:])
        assert mass.flatten().tolist() == pytest.approx([0.1, 0.1, 0.1, 0.6, 0.1])


def test_reference_is_softmax(close):
    """With lens = seq_len, "store" is the mean of the heads' softmax rows, and sums to 1."""
    scores = torch.randn(2, 6, 50, generator=torch.Generator().manual_seed(3))
    lens = torch.full((2,), 50, dtype=torch.int32)
    mass = torch.empty(2, 2, 50)
    reference.accumulate_mass(scores, scores.logsumexp(-1), lens, mass, 1 / 3, "store")
    close("mass", mass, scores.softmax(-1).view(2, 2, 3, 50).mean(2))
    close("mass", mass.sum(-1), torch.ones(2, 2))


@pytest.mark.parametrize("op", [accumulate_mass, reference.accumulate_mass], ids=["kernel", "reference"])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"combine": "sum"}, "combine: got 'sum', wanted store or add"),
        ({"mass": torch.empty(1, 3, 8)}, "mass: got 3 heads for 4 query heads"),
        ({"mass": torch.empty(1, 2, 9)}, r"mass: got shape \(1, 2, 9\)"),
        ({"scores": torch.empty(1, 4, 8, dtype=torch.float16)}, "scores: got torch.float16"),
        ({"positions": torch.ones(1, 8, dtype=torch.int32)}, "kept: got NoneType"),
        ({"kept": torch.ones(1, dtype=torch.int32)}, "kept: got a value without positions"),
        (
            {"positions": torch.ones(1, 8, dtype=torch.int32), "kept": torch.ones(1, dtype=torch.int32)},
            "combine: got 'store', wanted add, because positions are given",
        ),
        ({"shift": 1}, "combine: got 'store', wanted add, because of the shift"),
        ({"shift": -1, "combine": "add"}, "shift: got -1, wanted 0 to 64"),
    ],
    ids=[
        "combine",
        "groups",
        "width",
        "dtype",
        "positions alone",
        "kept alone",
        "store with a list",
        "store shifted",
        "shifted back",
    ],
)
def test_refuses(op, change, message):
    good = {
        "scores": torch.empty(1, 4, 8), "lse": torch.empty(1, 4), "lens": torch.ones(1, dtype=torch.int32),
        "mass": torch.empty(1, 2, 8), "weight": 1.0, "combine": "store",
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        op(**{**good, **change})
