"""count_ranked: kernel against reference, reference against going down the ranking in plain Python."""

from __future__ import annotations

import struct

import pytest
import torch

from specattn_vllm.kernels import reference
from specattn_vllm.kernels.count_ranked import BLOCK, count_ranked

OPS = pytest.mark.parametrize("op", [count_ranked, reference.count_ranked], ids=["kernel", "reference"])


def case(why, lens, share, sink=2, recent=3, tied=False):
    return pytest.param((lens, share, sink, recent, tied), id=why)


CASES = [
    case("one position", [1], 0.5, 0, 0),
    case("nothing but forced positions", [4, 5, 6], 0.9),
    case("no forced positions", [40, 17, 2], 0.8, 0, 0),
    case("padded rows", [0, 33, 0], 0.9),
    case("forced positions hold enough", [60], 0.01, 20, 30),
    case("all of it", [50, 7], 1.0),
    case("ranks that tie", [90, 70, 41], 0.6, tied=True),
    case("around a block", [BLOCK - 1, BLOCK, BLOCK + 1], 0.7),
    case("several blocks", [2 * BLOCK + 5, 3], 0.95, 4, 64),
]


def build(params, device, poisoned):
    """Weights and ranks that have something in common; strided rows, NaN from lens on and in rows of nobody."""
    lens, *_, tied = params
    width, gen = max(lens), torch.Generator().manual_seed(4)
    weights = poisoned((len(lens), width + 5), torch.float32, device)[:, 2 : 2 + width]
    ranking = poisoned((len(lens) + 2, width + 3), torch.float32, device)[:, 1 : 1 + width]
    rows = [(2 * x + 1) % (len(lens) + 2) if n else 10**9 for x, n in enumerate(lens)]
    for x, n in enumerate(lens):
        if n:
            logits = 3 * torch.randn(n, generator=gen)
            weights[x, :n] = logits.softmax(0).to(device)
            ranks = (logits + 2 * torch.randn(n, generator=gen)).softmax(0)
            ranking[rows[x], :n] = ((ranks * 400).round() / 400 if tied else ranks).to(device)
    return weights, ranking, *(torch.tensor(v, dtype=d, device=device) for v, d in ((lens, torch.int32), (rows, int)))


def plainly(weights: list[float], ranks: list[float], share: float, sink: int, recent: int) -> int:
    n = len(weights)
    quanta = [int(w * 2**30) for w in weights]
    need = -(-sum(quanta) * round(share * 65536) // 65536)
    keys = [struct.unpack("<I", struct.pack("<f", r))[0] >> 16 for r in ranks]
    taken = {p for p in range(n) if p < sink or p >= n - recent}
    for key in sorted({*keys}, reverse=True):
        if sum(quanta[p] for p in taken) >= need:
            break
        taken |= {p for p in range(n) if keys[p] == key}
    return len(taken)


@OPS
@pytest.mark.parametrize("params", CASES)
def test_as_far_down_the_ranking_as_it_takes(params, op, device, poisoned):
    weights, ranking, lens, rows = build(params, device, poisoned)
    counts = poisoned(lens.shape, torch.int32, device)
    op(weights, ranking, lens, counts, *params[1:4], rows)
    wanted = [
        plainly(weights[x, :n].tolist(), ranking[rows[x], :n].tolist(), *params[1:4]) if n else 0
        for x, n in enumerate(params[0])
    ]
    assert counts.tolist() == wanted


@OPS
def test_without_rows_each_ranks_itself(op, device, poisoned):
    """By its own mass a count is that of the fewest tokens that hold the share."""
    weights = build(([70, 40], 0.8, 0, 0, False), device, poisoned)[0]
    lens, counts = torch.tensor([70, 40], dtype=torch.int32, device=device), torch.empty(2, dtype=torch.int32)
    counts = counts.to(device)
    op(weights, weights, lens, counts, 0.8, 0, 0)
    for x, n in enumerate((70, 40)):
        held = weights[x, :n].sort(descending=True).values.cumsum(0)
        assert abs(int(counts[x]) - int((held < 0.8).sum()) - 1) <= 1  # ranks of 8 bits may tie


@OPS
def test_a_share_that_the_ranking_does_not_see_takes_everything(op, device):
    weights = torch.zeros(1, 50, device=device)
    weights[0, 20], weights[0, 30] = 0.5, 0.5
    ranking = torch.zeros(1, 50, device=device)
    ranking[0, 30], ranking[0, 10] = 0.3, 0.7
    lens, counts = (torch.tensor([n], dtype=torch.int32, device=device) for n in (50, -1))
    for share, wanted in ((0.5, 2), (0.51, 50)):
        op(weights, ranking, lens, counts, share, 0, 0)
        assert counts.tolist() == [wanted]


@OPS
@pytest.mark.parametrize(
    "change, message",
    [
        ({"share": 0.0}, "share: got 0.0, wanted more than 0"),
        ({"ranking": torch.zeros(3, 8)}, r"ranking: got shape \(3, 8\), wanted shape \(2, 8\)"),
        ({"lens": torch.ones(2, dtype=torch.int64)}, "lens: got torch.int64"),
        ({"counts": torch.ones(3, dtype=torch.int32)}, r"counts: got shape \(3,\)"),
        ({"recent": -1}, "recent: got -1"),
        ({"rows": torch.ones(2, dtype=torch.int32)}, "rows: got torch.int32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses(op, change, message):
    ones = torch.ones(2, dtype=torch.int32)
    good = {"weights": torch.zeros(2, 8), "ranking": torch.zeros(2, 8), "lens": ones, "counts": ones, "share": 0.5,
            "sink": 0, "recent": 0}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        op(**{**good, **change})
