"""accumulate_mass: kernel against reference, reference against softmax."""

from __future__ import annotations

import pytest
import torch

from specattn_vllm.kernels import reference
from specattn_vllm.kernels.selection import mass as module
from specattn_vllm.kernels.selection.mass import accumulate_mass


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
    ],
    ids=["combine", "groups", "width", "dtype"],
)
def test_refuses(op, change, message):
    good = {
        "scores": torch.empty(1, 4, 8), "lse": torch.empty(1, 4), "lens": torch.ones(1, dtype=torch.int32),
        "mass": torch.empty(1, 2, 8), "weight": 1.0, "combine": "store",
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        op(**{**good, **change})
