"""build_positions: kernel and reference equal to a plain-Python oracle, entry for entry."""

from __future__ import annotations

import pytest
import torch

from specattn_vllm.kernels import page_tables, reference
from specattn_vllm.kernels.page_tables import build_positions

OPS = pytest.mark.parametrize("op", [build_positions, reference.build_positions], ids=["kernel", "reference"])
POISON = -858993460

CASES = {
    "one token": ([1], 1),
    "around a word": ([31, 32, 33], 2),
    "padded rows": ([0, 70, -1], 3),
    "bits past the length do not count": ([10, 40], 5),
    "around a chunk of 4096": ([4095, 4096, 4097, 8200], 260),
    "all padded": ([0, 0], 2),
}


def random_bits(sources, rows, words, density, device, seed=0):
    flags = torch.rand(sources, rows, 1, words, 32, generator=torch.Generator().manual_seed(seed)) < density
    return (flags.long() << torch.arange(32)).sum(-1).to(torch.int32).to(device)


def check(op, bits, lens, positions, kept):
    op(bits, torch.tensor(lens, dtype=torch.int32, device=bits.device), positions, kept)
    for s in range(bits.shape[0]):
        for r, n in enumerate(lens):
            words = bits[s, r, 0].tolist()
            want = [p for p in range(n) if words[p // 32] >> (p % 32) & 1]
            assert kept[s, r] == (len(want) if n > 0 else -1)
            assert positions[s, r, : len(want)].tolist() == want
            assert (positions[s, r, len(want) :] == POISON).all()


@OPS
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("lens, words", CASES.values(), ids=CASES)
def test_equals_oracle(op, lens, words, density, device, poisoned):
    bits = random_bits(2, len(lens), words, density, device)
    width = max(max(lens), 1)
    positions = poisoned((2, len(lens), width), torch.int32, device)
    check(op, bits, lens, positions, poisoned((2, len(lens)), torch.int32, device))


@pytest.mark.parametrize("seed", range(6))
def test_chunks_at_random(seed, device, poisoned, monkeypatch):
    """Chunks, and steps of the count before them, so small that every row has several."""
    monkeypatch.setattr(page_tables, "CHUNK", 64)
    monkeypatch.setattr(page_tables, "COUNT_STEP", 2 << seed % 3)
    lens = torch.randint(-1, 400, (3,), generator=torch.Generator().manual_seed(seed)).tolist()
    bits = random_bits(1, 3, 13, 0.3, device, seed)
    check(build_positions, bits, lens, *(poisoned(s, torch.int32, device) for s in ((1, 3, 400), (1, 3))))


@OPS
def test_a_list_shorter_than_the_row(op, device, poisoned):
    """Few of many positions: the last of them lies far beyond the width."""
    bits = torch.zeros(1, 1, 1, 40, dtype=torch.int32, device=device)
    bits[0, 0, 0, ::13] = 1 << 7
    positions, kept = poisoned((1, 1, 5), torch.int32, device), poisoned((1, 1), torch.int32, device)
    check(op, bits, [1280], positions, kept)


@OPS
def test_what_does_not_fit_is_dropped(op, device, poisoned):
    """A caller's error; nothing is written past width, and nobody is told to read past it."""
    bits = torch.full((1, 2, 1, 2), -1, dtype=torch.int32, device=device)
    buffer, kept = poisoned((1, 2, 60), torch.int32, device), poisoned((1, 2), torch.int32, device)
    op(bits, torch.tensor([50, 20], dtype=torch.int32, device=device), buffer[..., :24], kept)
    assert kept.tolist() == [[24, 20]]
    assert buffer[0, 0, :24].tolist() == list(range(24))
    assert (buffer[..., 24:] == POISON).all()


@OPS
def test_strided_views(op, device, poisoned):
    """Everything a part of something larger; what is around it stays."""
    bits = random_bits(3, 5, 6, 0.4, device)
    positions, kept = poisoned((3, 5, 200), torch.int32, device), poisoned((3, 5), torch.int32, device)
    check(op, bits[1:, 1:4, :, :4], [100, 0, 90], positions[1:, 1:4, :110], kept[1:, 1:4])
    positions[1:, 1:4] = kept[1:, 1:4] = POISON
    assert (positions == POISON).all() and (kept == POISON).all()


@OPS
@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": torch.zeros(1, 1, 2, 2, dtype=torch.int32)}, r"bits: got shape \(1, 1, 2, 2\)"),
        ({"lens": torch.ones(1, dtype=torch.int64)}, "lens: got torch.int64, wanted torch.int32"),
        ({"kept": torch.zeros(1, 1, 1, dtype=torch.int32)}, r"kept: got shape \(1, 1, 1\)"),
        ({"positions": torch.zeros(1, 2, 8, dtype=torch.int32)}, r"positions: got shape \(1, 2, 8\)"),
    ],
    ids=["groups", "lens dtype", "kept shape", "rows"],
)
def test_refuses(op, change, message):
    good = {
        "bits": torch.zeros(1, 1, 1, 2, dtype=torch.int32), "lens": torch.ones(1, dtype=torch.int32),
        "positions": torch.zeros(1, 1, 8, dtype=torch.int32), "kept": torch.zeros(1, 1, dtype=torch.int32),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        op(**{**good, **change})
