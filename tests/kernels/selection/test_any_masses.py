"""Masses of any kind, NaN, infinities, ties and denormals among them: each selection is one."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specattn_vllm.kernels import reference
from specattn_vllm.kernels.selection.top_p import select_top_p

SIZES = st.sampled_from([0, 1, 2, 31, 32, 33, 64, 100])
NUMBERS = st.sampled_from([0, 0, 0, 1, 1, 5, 40, 2**31 - 1])  # mostly small, so that much is left to choose from


OPTIONS = st.fixed_dictionaries(
    {
        "top_p": st.sampled_from([0.0, 1e-6, 0.5, 0.999, 1.0, 7.0]),
        "min_tokens": NUMBERS,
        "max_tokens": st.sampled_from([-1, -1, 0, 1, 17, 2**31 - 1]),
        "max_fraction": st.sampled_from([0.0, 1e-9, 0.25, 1.0]),
        "sink": NUMBERS,
        "recent": NUMBERS,
    }
)


@st.composite
def lengths(draw) -> torch.Tensor:
    return torch.tensor(draw(st.lists(SIZES, min_size=1, max_size=3)), dtype=torch.int32)


def select(op, mass, lens, options):
    bits = torch.full((mass.shape[0], -(-mass.shape[1] // 32)), -858993460, dtype=torch.int32, device=mass.device)
    counts = torch.full((mass.shape[0],), -7, dtype=torch.int32, device=mass.device)
    op(mass, lens, bits, counts, **options)
    return bits.cpu(), counts.cpu()


def check_selection(lens, options, bits, counts):
    """What every selection is: tokens of the row, the forced ones among them, as many as it says, within the limits."""
    for row, n in enumerate(lens.tolist()):
        flags = reference.unpack_bits(bits[row], bits.shape[1] * 32)
        assert not flags[n:].any()
        forced = torch.arange(n)
        forced = (forced < options["sink"]) | (forced >= n - options["recent"])
        assert flags[:n][forced].all()
        assert int(flags.sum()) == int(counts[row])
        most = max((n * round(options["max_fraction"] * 65536) + 65535) >> 16, options["min_tokens"])
        most = min(most, options["max_tokens"]) if options["max_tokens"] >= 0 else most
        most = min(max(most, int(forced.sum())), n)
        assert min(options["min_tokens"], most) <= int(counts[row]) <= most


@settings(max_examples=600)
@given(data=st.data(), lens=lengths(), options=OPTIONS)
def test_a_selection_of_any_masses_is_one(any_numbers, data, lens, options):
    mass = any_numbers(data, (lens.shape[0], max(int(lens.max()), 1)))
    check_selection(lens, options, *select(reference.select_top_p, mass, lens, options))


@settings(max_examples=25)
@given(data=st.data(), lens=lengths(), options=OPTIONS)
def test_the_kernel_s_selection_of_any_masses_is_one(device, any_numbers, data, lens, options):
    mass = any_numbers(data, (lens.shape[0], max(int(lens.max()), 1)))
    bits, counts = select(select_top_p, mass.to(device), lens.to(device), options)
    check_selection(lens, options, bits, counts)
    if (mass >= 0).all() and (mass.sum(1) <= 1).all():  # what the kernel's sums have room for
        wanted = select(reference.select_top_p, mass, lens, options)
        assert torch.equal(bits, wanted[0]) and torch.equal(counts, wanted[1])


def test_masses_that_are_no_number_count_as_nothing(device):
    mass = torch.tensor([[torch.nan, 0.2, 0.5, -1.0, 0.1, torch.nan]])
    options = {"top_p": 1.0, "min_tokens": 0, "max_tokens": 3, "max_fraction": 1.0, "sink": 0, "recent": 0}
    for op, where in ((reference.select_top_p, "cpu"), (select_top_p, device)):
        lens = torch.tensor([6], dtype=torch.int32, device=where)
        bits, counts = select(op, mass.to(where), lens, options)
        assert reference.unpack_bits(bits[0], 6).nonzero().flatten().tolist() == [1, 2, 4] and counts.tolist() == [3]
