"""build_block_tables: kernel and reference equal to a plain-Python oracle; query rows packed and unpacked."""

from __future__ import annotations

import pytest
import torch

from specattn_vllm.kernels import reference
from specattn_vllm.kernels.selection import block_tables
from specattn_vllm.kernels.selection.block_tables import build_block_tables

OPS = pytest.mark.parametrize("op", [build_block_tables, reference.build_block_tables], ids=["kernel", "reference"])
UNTOUCHED = -858993460


def oracle(bits, slots, prefix_lens, seq_lens, block_table, block_size, strides, sources):
    """{(s, r): ([blocks], tokens)}, position by position."""
    tables = {}
    for s in range(sources):
        for r, slot in enumerate(slots.tolist()):
            length, prefix, chosen = int(seq_lens[r]), int(prefix_lens[r]), []
            if slot < 0:
                length = 0
            words = bits[s, slot, 0].tolist()
            for p in range(length):
                if p >= prefix or p >= 32 * len(words) or words[p // 32] >> (p % 32) & 1:
                    b = p // block_size
                    if b not in chosen[-1:]:
                        chosen.append(b)
            tokens = sum(min(block_size, length - b * block_size) for b in chosen)
            tables[s, r] = ([int(block_table[r, b]) for b in chosen], tokens)
    return tables


def case(why, rows, *, sources=1, block_size=16, density=0.05, words=None):
    """rows: (slot, prefix_len, seq_len)"""
    return pytest.param((rows, sources, block_size, density, words), id=why)


CASES = [
    case("one token", [(0, 1, 1)]),
    case("one token, no selection", [(0, -1, 1)]),
    case("around a word", [(0, 31, 31), (1, 32, 32), (2, 33, 33)]),
    case("around a block edge", [(0, 15, 15), (1, 16, 16), (2, 17, 17)]),
    case("new tokens after the prefix are kept", [(0, 40, 45), (1, 32, 40)]),
    case("new tokens over two blocks", [(0, 90, 100), (1, 95, 97), (2, 96, 112)]),
    case("last block not kept", [(0, 100, 100), (1, 96, 96)], density=0.0),
    case("last block kept by a bit", [(0, 100, 100), (1, 96, 96)], density=0.5),
    case("prefix 0 and -1 keep everything", [(0, 0, 50), (1, -1, 50)]),
    case("prefix past the sequence", [(0, 99, 60)]),
    case("prefix past the words", [(0, 90, 90), (1, 66, 120)], words=2),
    case("padded rows", [(-1, 20, 30), (0, 20, 30), (1, 20, 0), (-1, -1, 0)]),
    case("slots in any order, one used twice", [(3, 60, 70), (0, 60, 66), (3, 50, 70)]),
    case("several sources", [(1, 70, 75), (0, 30, 31)], sources=3),
    case("nothing selected", [(0, 64, 65), (1, 60, 64)], density=0.0),
    case("everything selected", [(0, 64, 64)], density=1.0),
    case("blocks of a word", [(0, 127, 130), (1, 128, 129)], block_size=32),
    case("big blocks", [(0, 700, 705), (1, 128, 129), (2, 400, 401)], block_size=128, density=0.01),
    case("block size that divides no word", [(0, 70, 75), (1, 300, 301)], block_size=24),
    case("block size beyond a word that is no multiple", [(0, 400, 401)], block_size=48, density=0.01),
]


def build(params, device, seed=0):
    rows, sources, block_size, density, words = params
    gen = torch.Generator().manual_seed(seed)
    longest = max(n for _, _, n in rows)
    words = words or -(-longest // 32) + 1
    # Bits past a prefix are there too, and mean nothing.
    flags = torch.rand(sources, 5, 1, words, 32, generator=gen) < density
    bits = (flags.long() << torch.arange(32)).sum(-1).to(torch.int32)
    width = -(-longest // block_size)
    # Entries past the end of a row are stale, and so is the whole row of a padded request.
    table = torch.tensor([2_000_000_000, -7], dtype=torch.int32).repeat(len(rows), width + 1)
    for r, (slot, _, n) in enumerate(rows):
        if slot >= 0:
            used = -(-n // block_size)
            table[r, :used] = torch.randperm(20 * width + 500, generator=gen)[:used].int()
    column = [torch.tensor(c) for c in zip(*rows, strict=True)]
    inputs = (bits, column[0].long(), column[1].int(), column[2].int(), table)
    return [t.to(device) for t in inputs] + [block_size, (1, 1, 1)], sources, width


def check(op, params, device, poisoned, seed=0):
    inputs, sources, width = build(params, device, seed)
    rows = len(params[0])
    # Outputs are slices of larger buffers.
    table = poisoned((sources, rows + 1, 2, width + 3), torch.int32, device)[:, :rows, :1, : width + 1]
    kept = poisoned((sources, rows + 1, 2), torch.int32, device)[:, :rows, :1]
    op(*inputs, table, kept)
    want = oracle(*[t.cpu() if isinstance(t, torch.Tensor) else t for t in inputs], sources)
    for (s, r), (blocks, tokens) in want.items():
        assert kept[s, r, 0] == tokens
        assert table[s, r, 0, : len(blocks)].tolist() == blocks
        assert (table[s, r, 0, len(blocks) :] == UNTOUCHED).all()


@OPS
@pytest.mark.parametrize("params", CASES)
def test_equals_oracle(op, params, device, poisoned):
    check(op, params, device, poisoned)


@pytest.mark.parametrize("seed", range(12))
def test_reference_equals_oracle_at_random(seed, poisoned):
    gen = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(4):
        n = int(torch.randint(0, 140, (), generator=gen))
        prefix = int(torch.randint(-1, n + 3, (), generator=gen))
        rows.append((int(torch.randint(-1, 5, (), generator=gen)), prefix, n))
    params = ([*rows, (0, 1, 1)], 2, (16, 32, 24)[seed % 3], 0.04, None)
    check(reference.build_block_tables, params, torch.device("cpu"), poisoned, seed)


@pytest.mark.parametrize("edge", [-1, 0, 1])
def test_rows_over_several_programs(edge, device, poisoned, monkeypatch):
    """Each program counts the blocks before its own, in steps of another size; kept is written by the last."""
    monkeypatch.setattr(block_tables, "CHUNK", 8)
    monkeypatch.setattr(block_tables, "COUNT_BLOCKS", 16)
    longest = 5 * 8 * 16 + edge
    rows = [(0, longest - 3, longest), (1, 8 * 16 - 1, 8 * 16 + edge), (2, -1, longest), (3, 300, 0)]
    check(build_block_tables, (rows, 2, 16, 0.03, None), device, poisoned)


def test_agrees_with_page_tables(device, poisoned):
    """Every block that holds a page of build_page_tables, and no other."""
    (*inputs, block_size, _), _, width = build(([(0, 200, 206), (1, -1, 33)], 2, 16, 0.03, None), device)
    pages = poisoned((2, 2, 1, width * 16), torch.int32, device)
    table = poisoned((2, 2, 1, width), torch.int32, device)
    page_count, kept = (poisoned((2, 2, 1), torch.int32, device) for _ in range(2))
    reference.build_page_tables(*inputs, block_size, (16, 0, 1), pages, page_count)
    build_block_tables(*inputs, block_size, (16, 0, 1), table, kept)
    for s in range(2):
        for r in range(2):
            of_pages = pages[s, r, 0, : int(page_count[s, r, 0])] // 16
            assert (
                torch.unique_consecutive(of_pages).tolist() == table[s, r, 0, : -(-int(kept[s, r, 0]) // 16)].tolist()
            )


def test_nothing_is_written_past_width(device, poisoned):
    """A row longer than the table is a caller's error; the kernel still stays inside the row."""
    inputs, *_ = build(([(0, -1, 400)], 1, 16, 0.5, None), device)
    buffer = poisoned((1, 1, 1, 25), torch.int32, device)
    build_block_tables(*inputs, buffer[..., :20], poisoned((1, 1, 1), torch.int32, device))
    assert (buffer[..., :20] >= 0).all()
    assert (buffer[..., 20:] == UNTOUCHED).all()


@OPS
@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": torch.zeros(1, 2, 2, 2, dtype=torch.int32)}, "bits: got 2 score groups, wanted 1"),
        ({"slots": torch.zeros(1, dtype=torch.int32)}, "slots: got torch.int32, wanted torch.int64"),
        ({"page_table": torch.zeros(1, 1, 2, 8, dtype=torch.int32)}, r"page_table: got shape \(1, 1, 2, 8\)"),
        ({"kept": torch.zeros(1, 2, 1, dtype=torch.int32)}, r"kept: got shape \(1, 2, 1\)"),
        ({"block_size": 0}, "block_size: got 0"),
        ({"sources": torch.zeros(1, dtype=torch.int32)}, "sources: got a map, wanted None, because a block holds all"),
        ({"groups": torch.zeros(1, 1, dtype=torch.int32)}, "groups: got a map, wanted None, because a block holds all"),
    ],
    ids=["groups", "slot dtype", "tables per head", "kept shape", "block size", "source map", "group map"],
)
def test_refuses(op, change, message):
    one = torch.ones(1, dtype=torch.int32)
    good = {
        "bits": torch.zeros(1, 2, 1, 2, dtype=torch.int32), "slots": torch.zeros(1, dtype=torch.int64),
        "prefix_lens": one, "seq_lens": one, "block_table": one[None], "block_size": 16, "page_strides": (48, 1, 3),
        "page_table": torch.zeros(1, 1, 1, 8, dtype=torch.int32), "kept": torch.zeros(1, 1, 1, dtype=torch.int32),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        op(**{**good, **change})
