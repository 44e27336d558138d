"""Selections of layers that each keep a part of the context of their own."""

from __future__ import annotations

import math

import pytest
import torch

from specattn_vllm import executors
from specattn_vllm.kernels.reference import unpack_bits
from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.selection.choose import Limits, choose
from specattn_vllm.selection.shares import SharedOut

CPU = torch.device("cpu")
OPERATIONS = executors.resolve("torch", CPU)
LONGEST, REQUESTS = 100, 4


def shared_out(selections, groups=1, **options) -> SharedOut:
    base = {"method": "specattn", "rule": "top_k", "ratio": 0.2, "min_tokens": 0, "sink_tokens": 1, "recent_tokens": 2}
    shape = {"groups": groups, "max_num_reqs": REQUESTS, "max_model_len": LONGEST}
    return SharedOut(SpecAttnOptions.parse({**base, **options}), selections, **shape, device=CPU)


def mass_of(sources: int, requests: int, groups: int) -> torch.Tensor:
    mass = torch.rand(sources, requests, groups, LONGEST, generator=torch.Generator().manual_seed(5))
    return mass / mass.sum(-1, keepdim=True)


def kept(bits: torch.Tensor) -> set[int]:
    return set(unpack_bits(bits, LONGEST).nonzero().flatten().tolist())


@pytest.mark.parametrize("groups", [1, 3])
def test_each_keeps_the_heaviest_of_its_source_as_many_as_its_fraction(groups):
    selections = ((0, 0.1), (1, 0.4), (1, 0.1), (1, 1.0))
    made, mass, lens = shared_out(selections, groups), mass_of(2, 3, groups), torch.tensor([100, 37, 0]).int()
    made._bits.fill_(-1)
    made.choose(OPERATIONS, mass, lens, union=False)
    for t, (source, fraction) in enumerate(selections):
        for r, length in enumerate(lens.tolist()):
            budget = math.ceil(round(fraction * 65536) * length / 65536)
            forced = {p for p in range(length) if p < 1 or p >= length - 2}
            for g in range(groups):
                others = sorted(set(range(length)) - forced, key=lambda p: -mass[source, r, g, p].item())
                wanted = forced | set(others[: max(budget - len(forced), 0)])
                assert kept(made.bits(3)[t, r, g]) == wanted, (t, r, g)


@pytest.mark.parametrize("limits", [{}, {"min_tokens": 30}, {"max_tokens": 9}, {"max_fraction": 0.1}], ids=str)
def test_the_fraction_of_the_ratio_is_the_rule_itself(limits):
    made, mass, lens = shared_out(((0, 0.2), (1, 0.2)), **limits), mass_of(2, 4, 1), torch.tensor([100, 64, 7, 1]).int()
    made.choose(OPERATIONS, mass, lens, union=False)
    base = {"min_tokens": 0, "sink_tokens": 1, "recent_tokens": 2}
    options = SpecAttnOptions.parse({"method": "specattn", "rule": "top_k", "ratio": 0.2, **{**base, **limits}})
    bits = torch.zeros_like(made.bits(4))
    choose(OPERATIONS, Limits.of(options), mass, lens.view(1, -1, 1), bits, torch.zeros(bits.shape[:3]).int())
    assert torch.equal(made.bits(4), bits)


def test_floor_and_cap_hold_for_each_layer():
    made, lens = shared_out(((0, 0.02), (0, 0.8)), min_tokens=10, max_tokens=30), torch.tensor([100]).int()
    made.choose(OPERATIONS, mass_of(1, 1, 1), lens, union=False)
    assert [len(kept(made.bits(1)[t, 0, 0])) for t in range(2)] == [10, 30]


def test_a_union_adds_to_what_is_there():
    made, lens = shared_out(((0, 0.1), (0, 0.3))), torch.tensor([100]).int()
    first, second = mass_of(2, 1, 1).split(1)
    alone = []
    for mass in (first, second):
        made.choose(OPERATIONS, mass, lens, union=False)
        alone.append(made.bits(1).clone())
    made.choose(OPERATIONS, first, lens, union=False)
    made.choose(OPERATIONS, second, lens, union=True)
    assert torch.equal(made.bits(1), alone[0] | alone[1])
    assert not torch.equal(alone[0], alone[1])


def test_rounds_of_as_many_rows_use_the_same_memory():
    made = shared_out(((0, 0.2),))
    assert made.bits(2).data_ptr() == made.bits(2).data_ptr()
    assert made.nbytes >= made.bits(REQUESTS).nbytes
