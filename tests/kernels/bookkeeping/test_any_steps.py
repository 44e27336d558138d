"""Steps of any rows: padded ones, the same numbers everywhere, counts at the edge of 32 bits, temperatures that are no
numbers. Kernels and references do the same, number for number, and touch nothing behind what they are given.

Not drawn, because the contracts exclude it: two rows in one slot, slots that the store does not have, and token ids
beyond 32 bits.
"""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specattn_vllm.kernels import reference
from specattn_vllm.kernels.bookkeeping import kernels as bookkeeping
from specattn_vllm.kernels.bookkeeping.contracts import Round

INT32 = st.sampled_from([-1, 0, 1, 2, 5, 2**31 - 1, -(2**31)]) | st.integers(-(2**31), 2**31 - 1)
COUNTS = st.sampled_from([0, 0, 1, 2, 5, 2**31 - 1]) | st.integers(0, 2**31 - 1)
POISON = -858993460
SLOTS = 12


def behind(values, dtype=torch.int32, number: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer that ends with poison, and its part with the values."""
    buffer = torch.full((len(values) + number,), POISON, dtype=dtype)
    buffer[: len(values)] = torch.tensor(values, dtype=dtype)
    return buffer, buffer[: len(values)]


def both(op: str, arguments, written: list[int], device) -> list[list[torch.Tensor]]:
    """What the kernel and what the reference makes of (buffer, its part) pairs; `written`: the places of results."""
    found = []
    for ops in (bookkeeping, reference):
        buffers = [a[0].clone().to(device) if isinstance(a, tuple) else a for a in arguments]
        parts = [b[: len(a[1])] if isinstance(a, tuple) else b for a, b in zip(arguments, buffers, strict=True)]
        getattr(ops, op)(*parts)
        found.append([buffers[i].cpu() for i in written])
    return found


@st.composite
def steps(draw):
    rows = draw(st.integers(0, 6))
    slots = draw(st.permutations(range(SLOTS)))[:rows]
    slots = [draw(st.sampled_from([slot, slot, -1])) for slot in slots]
    query = [draw(st.sampled_from([0, 1, 1, 4, 2**20])) for _ in slots]
    prefix = draw(st.lists(INT32, min_size=SLOTS + 1, max_size=SLOTS + 1))
    # Often the length that the slot's selection was made for.
    held = [max(prefix[slot], 0) for slot in slots]
    computed = [draw(st.sampled_from([n, n, n + 1, 0]) | COUNTS) for n in held]
    lens = [min(n + q, 2**31 - 1) for n, q in zip(computed, query, strict=True)]
    prefilling = [draw(st.booleans()) for _ in slots]
    starts = [sum(query[:r]) for r in range(rows + 1)]
    return slots, starts, lens, prefilling, prefix


@settings(max_examples=80)
@given(step=steps())
def test_selections_that_are_taken(device, step):
    slots, starts, lens, prefilling, prefix = step
    rows = len(slots)
    arguments = [
        behind(slots, torch.int64), behind(starts), behind(lens), behind(prefilling, torch.bool), behind(prefix),
        behind([POISON] * rows), behind([POISON] * rows),
    ]  # fmt: skip
    kernel, theirs = both("take_selections", arguments, [4, 5, 6], device)
    assert all(torch.equal(a, b) for a, b in zip(kernel, theirs, strict=True))
    prefix_lens, usable, _ = kernel
    for row, slot in enumerate(slots):
        if slot < 0 or prefilling[row]:
            assert usable[row] == -1
        if slot >= 0 and prefilling[row]:
            assert prefix_lens[slot] == -1
    assert all((buffer[len(part) :] == POISON).all() for buffer, (_, part) in zip(kernel, arguments[4:], strict=True))


@settings(max_examples=80)
@given(data=st.data(), step=steps(), sources=st.sampled_from([0, 1, 3, 40]), groups=st.sampled_from([1, 4]))
def test_reads_that_are_counted(device, data, step, sources, groups):
    slots, _, lens, prefilling, _ = step
    rows = len(slots)
    stored = data.draw(st.lists(INT32, min_size=rows, max_size=rows))
    fits = data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    # As take_selections gives them: what is usable is what is stored.
    usable = [length if fit and length >= 0 else -1 for length, fit in zip(stored, fits, strict=True)]
    few = data.draw(st.lists(COUNTS, min_size=1, max_size=4))
    # A part of something larger, so that its strides are not those of its shape.
    buffer = torch.full((sources + 1, rows + 2, groups + 1), POISON, dtype=torch.int32)
    number = sources * rows * groups
    buffer[1:, 1 : rows + 1, :groups] = torch.tensor((few * (number // len(few) + 1))[:number], dtype=torch.int32).view(
        sources, rows, groups
    )
    kept = buffer.to(device)[1:, 1 : rows + 1, :groups]
    layers_of = torch.full((sources,), data.draw(st.sampled_from([0, 1, 80])), dtype=torch.int64, device=device)
    arguments = [
        behind(slots, torch.int64), behind(lens), behind(prefilling, torch.bool), behind(usable), behind(stored), kept,
        layers_of, 8, 90, data.draw(st.sampled_from([0, 1, 90])), behind([POISON] * 5, torch.int64),
    ]  # fmt: skip
    (kernel,), (theirs,) = both("count_reads", arguments, [10], device)
    assert torch.equal(kernel, theirs)
    assert (kernel[5:] == POISON).all()
    verifying = sum(slot >= 0 and not prefills for slot, prefills in zip(slots, prefilling, strict=True))
    assert int(kernel[:3].sum()) == verifying and (kernel[3:5] >= 0).all()


@settings(max_examples=40)
@given(
    data=st.data(), counts=st.lists(COUNTS, max_size=6), total=st.integers(0, 2**62),
    dtype=st.sampled_from([torch.int32, torch.int64]), masked=st.booleans(),
)  # fmt: skip
def test_sampled_tokens_that_are_counted(device, data, counts, total, dtype, masked):
    verified = data.draw(st.lists(st.booleans(), min_size=len(counts), max_size=len(counts)))
    mask = behind(verified, torch.bool) if masked else None
    [kernel], [theirs] = both("count_sampled", [behind(counts, dtype), mask, behind([total], torch.int64)], [2], device)
    assert torch.equal(kernel, theirs)
    assert kernel[0] == total + sum(n for n, v in zip(counts, verified, strict=True) if v or not masked)


@settings(max_examples=40)
@given(data=st.data(), reqs=st.integers(0, 4), padded=st.integers(0, 3), query=st.integers(1, 3))
def test_rounds_that_are_loaded(device, any_numbers, data, reqs, padded, query):
    rows, slots = reqs + padded, 8
    ints = lambda number: data.draw(st.lists(INT32, min_size=number, max_size=number))  # noqa: E731
    seeds = data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=slots, max_size=slots))
    temperature = torch.cat((any_numbers(data, (slots,)), torch.full((3,), 77.0)))
    given_round = Round(
        behind(ints(reqs * query))[0], behind(ints(reqs * query), torch.int64)[0], behind(ints(reqs))[0],
        behind(ints(reqs), torch.int64)[0], behind(ints(reqs), torch.int64)[0], behind(ints(reqs))[0],
        behind(ints(slots), torch.int64)[0], temperature, behind(seeds, torch.int64)[0],
    )  # fmt: skip
    results = []
    for ops in (bookkeeping, reference):
        whole = [torch.full(((rows * query, rows)[i > 1] + 3,), POISON, dtype=torch.int32) for i in range(6)]
        whole[1], whole[3] = whole[1].long(), whole[3].long()
        whole += [torch.full((slots + 3,), POISON, dtype=d) for d in (torch.int32, torch.float32, torch.int64)]
        whole = [tensor.to(device) for tensor in whole]
        held = Round(*whole[:6], *(tensor[:slots] for tensor in whole[6:]))
        ops.load_round(Round(*(tensor.to(device) for tensor in given_round)), held, reqs, rows, query)
        results.append([tensor.cpu() for tensor in whole])
    for mine, its in zip(*results, strict=True):
        bits = torch.int64 if mine.element_size() == 8 else torch.int32
        assert torch.equal(mine.view(bits), its.view(bits))  # the same NaN too
        assert (mine[-3:] == POISON).all()
