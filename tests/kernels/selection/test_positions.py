"""build_positions: kernel and reference equal to a plain-Python oracle, entry for entry."""

from __future__ import annotations

import pytest
import torch

from specattn_vllm.kernels import reference
from specattn_vllm.kernels.selection import page_tables
from specattn_vllm.kernels.selection.page_tables import build_positions

OPS = pytest.mark.parametrize("op", [build_positions, reference.build_positions], ids=["kernel", "reference"])
POISON = -858993460

# Rows of (slot, prefix, length), and words.
CASES = {
    "one token": ([(0, 1, 1)], 1),
    "around a word": ([(1, 31, 31), (0, 32, 32), (2, 33, 33)], 2),
    "rows without a list": ([(3, 0, 70), (0, 70, 70), (1, -1, 5), (-1, 70, 70), (2, 9, 0), (4, 9, -1)], 3),
    "bits past the length do not count": ([(1, 10, 10), (0, 40, 40)], 5),
    "newer positions": ([(2, 1, 70), (0, 31, 33), (1, 64, 65), (3, 90, 96)], 3),
    "around a chunk of 4096": ([(3, 4095, 4095), (0, 4096, 4099), (1, 4097, 4097), (2, 100, 8200)], 260),
    "no row has one": ([(-1, 0, 0), (-1, 0, 0)], 2),
}


def random_bits(sources, slots, words, density, device, seed=0):
    flags = torch.rand(sources, slots, 1, words, 32, generator=torch.Generator().manual_seed(seed)) < density
    return (flags.long() << torch.arange(32)).sum(-1).to(torch.int32).to(device)


def columns(rows, device):
    """slots, prefix_lens and lens of rows."""
    slots, *lengths = zip(*rows, strict=True)
    ints = (torch.tensor(n, dtype=torch.int32, device=device) for n in lengths)
    return torch.tensor(slots, dtype=torch.int64, device=device), *ints


def check(op, bits, rows, positions, kept):
    op(bits, *columns(rows, bits.device), positions, kept)
    for s in range(bits.shape[0]):
        for r, (slot, prefix, n) in enumerate(rows):
            listed = slot >= 0 and prefix > 0 and n > 0
            words = bits[s, slot, 0].tolist()
            want = [p for p in range(n) if p >= prefix or words[p // 32] >> (p % 32) & 1] if listed else []
            assert kept[s, r] == (len(want) if listed else -1)
            assert positions[s, r, : len(want)].tolist() == want
            assert (positions[s, r, len(want) :] == POISON).all()


@OPS
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("rows, words", CASES.values(), ids=CASES)
def test_equals_oracle(op, rows, words, density, device, poisoned):
    bits = random_bits(2, 5, words, density, device)
    width = max(*(n for _, _, n in rows), 1)
    positions = poisoned((2, len(rows), width), torch.int32, device)
    check(op, bits, rows, positions, poisoned((2, len(rows)), torch.int32, device))


@pytest.mark.parametrize("seed", range(6))
def test_chunks_at_random(seed, device, poisoned, monkeypatch):
    """Chunks, and steps of the count before them, so small that every row has several."""
    monkeypatch.setattr(page_tables, "CHUNK", 64)
    monkeypatch.setattr(page_tables, "COUNT_STEP", 2 << seed % 3)
    gen = torch.Generator().manual_seed(seed)
    lens = torch.randint(-1, 400, (3,), generator=gen).tolist()
    rows = [(2 - r, int(torch.randint(0, max(n, 1), (), generator=gen)), n) for r, n in enumerate(lens)]
    bits = random_bits(1, 3, 13, 0.3, device, seed)
    check(build_positions, bits, rows, *(poisoned(s, torch.int32, device) for s in ((1, 3, 400), (1, 3))))


@OPS
def test_a_list_shorter_than_the_row(op, device, poisoned):
    """Few of many positions: the last of them lies far beyond the width."""
    bits = torch.zeros(1, 1, 1, 40, dtype=torch.int32, device=device)
    bits[0, 0, 0, ::13] = 1 << 7
    positions, kept = poisoned((1, 1, 5), torch.int32, device), poisoned((1, 1), torch.int32, device)
    check(op, bits, [(0, 1280, 1280)], positions, kept)


@OPS
def test_what_does_not_fit_is_dropped(op, device, poisoned):
    """A caller's error; nothing is written past width, and nobody is told to read past it."""
    bits = torch.full((1, 2, 1, 2), -1, dtype=torch.int32, device=device)
    buffer, kept = poisoned((1, 2, 60), torch.int32, device), poisoned((1, 2), torch.int32, device)
    op(bits, *columns([(1, 50, 50), (0, 7, 20)], device), buffer[..., :24], kept)
    assert kept.tolist() == [[24, 20]]
    assert buffer[0, 0, :24].tolist() == list(range(24))
    assert (buffer[..., 24:] == POISON).all()


@OPS
def test_strided_views(op, device, poisoned):
    """Everything a part of something larger; what is around it stays."""
    bits = random_bits(3, 5, 6, 0.4, device)
    positions, kept = poisoned((3, 5, 200), torch.int32, device), poisoned((3, 5), torch.int32, device)
    check(op, bits[1:, 1:4, :, :4], [(2, 70, 100), (0, 0, 0), (1, 90, 90)], positions[1:, 1:4, :110], kept[1:, 1:4])
    positions[1:, 1:4] = kept[1:, 1:4] = POISON
    assert (positions == POISON).all() and (kept == POISON).all()


@OPS
@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": torch.zeros(1, 1, 2, 2, dtype=torch.int32)}, r"bits: got shape \(1, 1, 2, 2\)"),
        ({"lens": torch.ones(1, dtype=torch.int64)}, "lens: got torch.int64, wanted torch.int32"),
        ({"slots": torch.zeros(1, dtype=torch.int32)}, "slots: got torch.int32, wanted torch.int64"),
        ({"prefix_lens": torch.ones(2, dtype=torch.int32)}, r"prefix_lens: got shape \(2,\)"),
        ({"kept": torch.zeros(1, 1, 1, dtype=torch.int32)}, r"kept: got shape \(1, 1, 1\)"),
        ({"positions": torch.zeros(1, 2, 8, dtype=torch.int32)}, r"positions: got shape \(1, 2, 8\)"),
    ],
    ids=["groups", "lens dtype", "slots dtype", "prefixes", "kept shape", "rows"],
)
def test_refuses(op, change, message):
    good = {
        "bits": torch.zeros(1, 1, 1, 2, dtype=torch.int32), "slots": torch.zeros(1, dtype=torch.int64),
        "prefix_lens": torch.ones(1, dtype=torch.int32), "lens": torch.ones(1, dtype=torch.int32),
        "positions": torch.zeros(1, 1, 8, dtype=torch.int32), "kept": torch.zeros(1, 1, dtype=torch.int32),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        op(**{**good, **change})
