"""dilate_mass: kernel against reference, reference against the formula."""

from __future__ import annotations

import pytest
import torch

from specattn_vllm.kernels import reference
from specattn_vllm.kernels.selection import mass as module
from specattn_vllm.kernels.selection.mass import DILATE_BLOCK as BLOCK
from specattn_vllm.kernels.selection.mass import dilate_mass

OPS = pytest.mark.parametrize("op", [dilate_mass, reference.dilate_mass], ids=["kernel", "reference"])


def case(why, lens, width, steps):
    return pytest.param((lens, width, steps), id=why)


CASES = [
    case("one position", [1], 1, 3),
    case("no steps", [40, 17], 41, 0),
    case("fewer positions than steps", [2, 5, 6, 7], 9, 6),
    case("padded rows", [0, 33, 0], 35, 2),
    case("around a block", [BLOCK - 1, BLOCK, BLOCK + 1], BLOCK + 7, 6),
    case("over the edges of several blocks", [3 * BLOCK + 5], 3 * BLOCK + 5, 9),
    case("the most steps", [200, 64, 65], 201, 64),
]


def build(params, device, poisoned):
    """Distinct masses that sum to 1 in every row, strided rows, and NaN from lens on."""
    lens, width, _ = params
    gen = torch.Generator().manual_seed(4)
    mass = poisoned((len(lens), width + 5), torch.float32, device)[:, 2 : 2 + width]
    for x, n in enumerate(lens):
        if n:
            values = torch.rand(n, generator=gen, dtype=torch.float64) ** 8
            mass[x, :n] = (values / values.sum()).float().to(device)
    return mass, torch.tensor(lens, dtype=torch.int32, device=device)


@pytest.mark.parametrize("params", CASES)
def test_kernel_matches_reference(params, device, poisoned):
    """To the bit: a maximum rounds nothing, and the weight is one product."""
    mass, lens = build(params, device, poisoned)
    out, want = (poisoned(mass.shape, torch.float32, device) for _ in range(2))
    dilate_mass(mass, lens, out, params[2], 0.3)
    reference.dilate_mass(mass, lens, want, params[2], 0.3)
    for x, n in enumerate(params[0]):
        assert torch.equal(out[x, :n], want[x, :n])
        assert out[x, n:].isnan().all() and want[x, n:].isnan().all()


@pytest.mark.parametrize("params", CASES[:5])
def test_reference_matches_the_formula(params, poisoned):
    mass, lens = build(params, torch.device("cpu"), poisoned)
    out = poisoned(mass.shape, torch.float32, mass.device)
    reference.dilate_mass(mass, lens, out, params[2], 0.5)
    for x, n in enumerate(params[0]):
        values = mass[x].tolist()
        assert out[x, :n].tolist() == [0.5 * max(values[max(p - params[2], 0) : p + 1]) for p in range(n)]


@OPS
def test_weight_keeps_the_sum(op, device, poisoned):
    """Lone peaks are the worst case: each is counted once per step and once for itself, but where the row ends."""
    mass = torch.zeros(1, 100, device=device)
    mass[0, [10, 50, 98]] = torch.tensor([0.5, 0.25, 0.25], device=device)
    lens = torch.tensor([100], dtype=torch.int32, device=device)
    out = poisoned(mass.shape, torch.float32, device)
    op(mass, lens, out, 5, 1 / 6)
    assert out.sum().item() == pytest.approx(0.75 + 0.25 * 2 / 6)
    assert out[0].nonzero().flatten().tolist() == [*range(10, 16), *range(50, 56), 98, 99]


def test_more_rows_than_programs(device, poisoned, monkeypatch):
    """One program a row then, which walks along it."""
    monkeypatch.setattr(module, "PROGRAMS", 2)
    params = ([3 * BLOCK + 5, 0, BLOCK, 2 * BLOCK + 1], 4 * BLOCK, 3)
    test_kernel_matches_reference(params, device, poisoned)


@OPS
def test_beyond_2_31_elements(op, device):
    """row * row stride overflows int32; virtual memory but for what is read and written."""
    stride = 2**30 + 8
    mass, out = (torch.empty(2 * stride + 20, device=device).as_strided((3, 20), (stride, 1)) for _ in range(2))
    assert 2 * mass.stride(0) > 2**31
    mass[2] = torch.arange(20, device=device) / 400
    op(mass, torch.tensor([0, 0, 20], dtype=torch.int32, device=device), out, 1, 1.0)
    assert torch.equal(out[2], mass[2])


@OPS
@pytest.mark.parametrize(
    "change, message",
    [
        ({"mass": torch.ones(2, 8, dtype=torch.float64)}, "mass: got torch.float64"),
        ({"lens": torch.ones(3, dtype=torch.int32)}, r"lens: got shape \(3,\)"),
        ({"out": torch.empty(2, 9)}, r"out: got shape \(2, 9\)"),
        ({"steps": -1}, "steps: got -1, wanted 0 to 64"),
        ({"steps": 65}, "steps: got 65, wanted 0 to 64"),
        ({"weight": 0.0}, "weight: got 0.0, wanted more than 0"),
    ],
    ids=["dtype", "row count", "width", "backward", "too many steps", "no weight"],
)
def test_refuses(op, change, message):
    good = {
        "mass": torch.ones(2, 8), "lens": torch.ones(2, dtype=torch.int32), "out": torch.empty(2, 8), "steps": 1,
        "weight": 1.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        op(**{**good, **change})


@OPS
def test_refuses_shared_memory(op, poisoned):
    """In place, a position would take over what another has just taken over. Rows side by side share nothing."""
    lens = torch.ones(2, dtype=torch.int32)
    both = torch.ones(4, 8)
    op(both[:2], lens, both[2:], 1, 1.0)
    for mass, out in ((both[:2], both[:2]), (both[:2], both[1:3]), (both[1:3], both[:2])):
        with pytest.raises(ValueError, match="out: got memory of mass, wanted memory of its own"):
            op(mass, lens, out, 1, 1.0)
