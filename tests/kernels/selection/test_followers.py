"""add_followers: kernel and reference against the formula in plain Python, and against poisoned memory."""

from __future__ import annotations

import pytest
import torch

from specattn_vllm.kernels import reference
from specattn_vllm.kernels.selection.add_followers import BLOCK, add_followers

OP = pytest.mark.parametrize("op", [add_followers, reference.add_followers], ids=["kernel", "reference"])
FAR = 10**9  # a row that following would fault on, or read nonsense from
STALE = 7  # an id that is among the tokens to come, at places that are not to be read


def ints(values, device, dtype=torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


@OP
@pytest.mark.parametrize("tokens", [1, 5], ids=["one token", "five tokens"])
@pytest.mark.parametrize(
    "lens, groups, sources",
    [
        ([1], 1, [0]),
        ([2, 0, 40], 3, [1, 1]),
        ([BLOCK - 1, BLOCK, BLOCK + 1], 1, [2, 0]),
        ([0, 0], 2, [1]),
    ],
    ids=["one position", "padded row, twice from one source", "around a block", "nothing"],
)
def test_what_follows_weighs_more(lens, groups, sources, tokens, op, device, poisoned):
    width, rows, slots = max(*lens, 8) + 3, len(lens), len(lens) + 2
    gen = torch.Generator().manual_seed(3)
    mass = poisoned((3, rows, groups, width + 4), torch.float32, device)[..., 2 : 2 + width]
    ids = torch.full((slots, width + 1), STALE, dtype=torch.int32, device=device)[:, :width]
    coming = torch.randint(0, 6, (rows, tokens), generator=gen)
    coming[:, -1] = torch.where(torch.arange(rows) % 2 == 0, STALE, -1)  # a row may know fewer
    slot_of = [slots - 1 - r if n else FAR for r, n in enumerate(lens)]
    for r, n in enumerate(lens):
        if n:
            mass[:, r, :, :n] = torch.rand(3, groups, n, generator=gen).to(device)
            # The last token of a context is followed by what is not in it.
            ids[slot_of[r], : n - 1] = torch.randint(-1, 9, (n - 1,), generator=gen).int().to(device)
    out = poisoned((len(sources), rows, groups, width), torch.float32, device)
    wide = ints(sources, device, torch.int64), ids, ints(slot_of, device, torch.int64), coming.to(device)
    op(mass, ints(lens, device), out, *wide)
    raised = 0
    for r, n in enumerate(lens):
        context, known = ids[slot_of[r]].tolist() if n else [], {t for t in coming[r].tolist() if t >= 0}
        follows = torch.tensor([p > 0 and context[p - 1] in known for p in range(n)], device=device)
        raised += int(follows.sum())
        for at, source in enumerate(sources):
            if n:
                torch.testing.assert_close(out[at, r, :, :n], mass[source, r, :, :n] + follows * 0.5 / n)
            assert out[at, r, :, n:].isnan().all()
    assert raised > 3 or max(lens) < 8


@OP
@pytest.mark.parametrize("change", ["out", "ids", "tokens", "many", "slots", "sources", "memory"])
def test_it_refuses(op, change):
    mass = torch.zeros(3, 2, 1, 8)
    good = {
        "mass": mass, "lens": torch.zeros(2, dtype=torch.int32), "out": torch.zeros(1, 2, 1, 8),
        "sources": torch.zeros(1, dtype=torch.int64), "ids": torch.zeros(4, 8, dtype=torch.int32),
        "slots": torch.zeros(2, dtype=torch.int64), "tokens": torch.zeros(2, 5, dtype=torch.int64),
    }  # fmt: skip
    bad = {
        "out": ({"out": torch.zeros(1, 2, 1, 7)}, r"out: got shape \(1, 2, 1, 7\)"),
        "ids": ({"ids": torch.zeros(4, 8, dtype=torch.int64)}, "ids: got torch.int64, wanted torch.int32"),
        "tokens": ({"tokens": torch.zeros(3, 5, dtype=torch.int64)}, r"tokens: got shape \(3, 5\)"),
        "many": ({"tokens": torch.zeros(2, 65, dtype=torch.int64)}, "tokens: got 65 for a row, wanted at most 64"),
        "slots": ({"slots": torch.zeros(2, dtype=torch.int32)}, "slots: got torch.int32"),
        "sources": ({"sources": torch.zeros(2, dtype=torch.int64)}, r"sources: got shape \(2,\)"),
        "memory": ({"out": mass[1:2]}, "out: got memory of mass"),
    }
    values, message = bad[change]
    with pytest.raises(ValueError, match=message):
        op(**{**good, **values})
