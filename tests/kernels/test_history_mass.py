"""average_mass and add_mass: kernels against the formulas in plain Python, and both against poisoned memory."""

from __future__ import annotations

import pytest
import torch

from specattn_vllm.kernels import reference
from specattn_vllm.kernels.add_mass import add_mass
from specattn_vllm.kernels.average_mass import BLOCK, average_mass

AVERAGE = pytest.mark.parametrize("op", [average_mass, reference.average_mass], ids=["kernel", "reference"])
ADD = pytest.mark.parametrize("op", [add_mass, reference.add_mass], ids=["kernel", "reference"])
FAR = 10**9  # a row that following would fault on, or read nonsense from


def ints(values: list[int], device, dtype=torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


@AVERAGE
@pytest.mark.parametrize(
    "lens, groups, steps",
    [
        ([1], 1, 3),
        ([40, 0, 17], 3, 0),
        ([2, 5, 6, 7], 2, 6),
        ([BLOCK - 1, BLOCK, BLOCK + 1], 2, 5),
        ([0, 0], 2, 1),
    ],
    ids=["one position", "padded rows, no steps", "fewer positions than steps", "around a block", "nothing to keep"],
)
def test_the_mean_of_what_is_spread_is_kept(lens, groups, steps, op, device, poisoned):
    width, number = max(*lens, 8) + 3, len(lens)
    gen = torch.Generator().manual_seed(3)
    mass = poisoned((number, groups, width + 4), torch.float32, device)[..., 2 : 2 + width]
    for x, n in enumerate(lens):
        mass[x, :, :n] = torch.rand(groups, n, generator=gen).to(device)
    out = poisoned((number + 2, width), torch.bfloat16, device)
    rows = [number + 1 - x if n else FAR for x, n in enumerate(lens)]
    op(mass, ints(lens, device), out, ints(rows, device, torch.int64), steps)
    for x, n in enumerate(lens):
        if n:
            spread = [[max(row[max(p - steps, 0) : p + 1]) for p in range(n)] for row in mass[x, :, :n].tolist()]
            wanted = torch.tensor(spread).mean(0)
            # A unit in the last of 8 bits: Triton's interpreter cuts off where a GPU rounds.
            torch.testing.assert_close(out[rows[x], :n].float().cpu(), wanted, rtol=2**-7, atol=0)
            assert out[rows[x], n:].isnan().all()
    assert all(out[z].isnan().all() for z in {*range(number + 2)} - {*rows})


@ADD
@pytest.mark.parametrize(
    "lens, others",
    [([33, 0, 20, 50], [40, 9, 0, 12]), ([BLOCK - 1, BLOCK + 1, 2 * BLOCK], [BLOCK + 1, BLOCK, 3])],
    ids=["shorter, longer, none, padded", "around a block"],
)
def test_what_is_remembered_is_added_as_far_as_it_goes(lens, others, op, device, poisoned):
    number, width = len(lens), max(*lens, *others) + 5
    gen = torch.Generator().manual_seed(3)
    mass = poisoned((number + 1, width + 3), torch.float32, device)[:, 3:]
    other = poisoned((number + 2, width + 2), torch.bfloat16, device)[:, :width]
    rows = [(x + 2) % (number + 1) if n else FAR for x, n in enumerate(lens)]
    other_rows = [(x + 1) % (number + 2) if n and lens[x] else FAR for x, n in enumerate(others)]
    out = poisoned((number, width), torch.float32, device)
    for x, (n, m) in enumerate(zip(lens, others, strict=True)):
        if n:
            mass[rows[x], :n] = torch.rand(n, generator=gen).to(device)
        if n and m:
            other[other_rows[x], :m] = torch.rand(m, generator=gen).bfloat16().to(device)
    arguments = (ints(lens, device), out, ints(rows, device, torch.int64), other, ints(other_rows, device, torch.int64))
    op(mass, *arguments, ints(others, device), 0.3)
    for x, (n, m) in enumerate(zip(lens, others, strict=True)):
        if n:
            wanted = mass[rows[x], :n].clone()
            m = min(n, m)
            if m:
                wanted[:m] += 0.3 * other[other_rows[x], :m].float()
            torch.testing.assert_close(out[x, :n], wanted)
        assert out[x, n:].isnan().all()


@AVERAGE
@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 65}, "steps: got 65, wanted 0 to 64"),
        ({"out": torch.zeros(4, 8)}, "out: got torch.float32, wanted torch.bfloat16"),
        ({"rows": torch.zeros(2, dtype=torch.int32)}, "rows: got torch.int32"),
        ({"lens": torch.zeros(3, dtype=torch.int32)}, r"lens: got shape \(3,\)"),
    ],
    ids=["steps", "out", "rows", "lens"],
)
def test_average_refuses(op, change, message):
    good = {"mass": torch.zeros(2, 3, 8), "lens": torch.zeros(2, dtype=torch.int32), "steps": 0,
            "out": torch.zeros(4, 8, dtype=torch.bfloat16), "rows": torch.zeros(2, dtype=torch.int64)}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        op(**{**good, **change})


@ADD
@pytest.mark.parametrize("change", ["out", "other", "other_lens", "weight", "rows", "memory"])
def test_add_refuses(op, change):
    mass = torch.zeros(3, 8)
    good = {
        "mass": mass, "lens": torch.zeros(2, dtype=torch.int32), "out": torch.zeros(2, 8), "weight": 0.5,
        "rows": torch.zeros(2, dtype=torch.int64), "other": torch.zeros(5, 8, dtype=torch.bfloat16),
        "other_rows": torch.zeros(2, dtype=torch.int64), "other_lens": torch.zeros(2, dtype=torch.int32),
    }  # fmt: skip
    bad = {
        "out": ({"out": torch.zeros(2, 7)}, r"out: got shape \(2, 7\)"),
        "other": ({"other": torch.zeros(5, 8)}, "other: got torch.float32, wanted torch.bfloat16"),
        "other_lens": ({"other_lens": torch.zeros(3, dtype=torch.int32)}, r"other_lens: got shape \(3,\)"),
        "weight": ({"weight": -1.0}, "weight: got -1.0"),
        "rows": ({"rows": torch.zeros(2, dtype=torch.int32)}, "rows: got torch.int32"),
        "memory": ({"out": mass[1:]}, "out: got memory of mass"),
    }
    values, message = bad[change]
    with pytest.raises(ValueError, match=message):
        op(**{**good, **values})
