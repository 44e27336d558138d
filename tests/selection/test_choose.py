"""Limits: options as `select_top_p` takes them; and the two rules on one row of mass."""

from __future__ import annotations

import torch

from specattn_vllm import executors
from specattn_vllm.kernels.reference import unpack_bits
from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.selection.choose import Limits, choose

CPU = torch.device("cpu")


def kept(options: dict, mass: torch.Tensor) -> list[int]:
    options = {"method": "specattn", "min_tokens": 0, "sink_tokens": 0, "recent_tokens": 0, **options}
    limits = Limits.of(SpecAttnOptions.parse(options))
    length = mass.shape[0]
    bits = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    counts = torch.zeros(1, 1, 1, dtype=torch.int32)
    lens = torch.tensor([length], dtype=torch.int32)
    choose(executors.resolve("torch", CPU), limits, mass.view(1, 1, 1, -1), lens.view(1, 1, 1), bits, counts)
    assert counts.item() == unpack_bits(bits, length).sum()
    return unpack_bits(bits[0, 0, 0], length).nonzero().flatten().tolist()


MASS = torch.tensor([0.05, 0.4, 0.05, 0.3, 0.05, 0.05, 0.05, 0.05])


def test_top_p_keeps_what_holds_the_mass():
    assert kept({"rule": "top_p", "top_p": 0.65, "ratio": 0.125}, MASS) == [1, 3]


def test_top_k_keeps_a_share_of_the_context():
    # Whatever the mass: of equals the most recent.
    assert kept({"rule": "top_k", "ratio": 0.375, "top_p": 0.01}, MASS) == [1, 3, 7]


def test_top_k_obeys_floor_and_caps():
    assert len(kept({"rule": "top_k", "ratio": 0.125, "min_tokens": 1}, MASS)) == 1
    assert kept({"rule": "top_k", "ratio": 0.125, "min_tokens": 2}, MASS) == [1, 3]
    assert len(kept({"rule": "top_k", "ratio": 0.125, "min_tokens": 256}, MASS)) == 8
    assert kept({"rule": "top_k", "ratio": 1.0, "max_tokens": 2, "min_tokens": 1}, MASS) == [1, 3]
    assert kept({"rule": "top_k", "ratio": 1.0, "max_fraction": 0.25}, MASS) == [1, 3]


def test_without_a_rule_it_is_that_of_the_method():
    given = {"method": "specattn", "rule": "top_k", "ratio": 0.25}
    assert Limits.of(SpecAttnOptions.parse({"method": "specattn"})) == Limits.of(SpecAttnOptions.parse(given))
    sts = {"method": "sts", "ratio": 0.375}
    assert kept(sts, MASS) == kept({"rule": "top_k", **sts}, MASS) == [1, 3, 7]
