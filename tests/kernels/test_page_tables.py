"""build_page_tables: kernel and reference equal to a plain-Python oracle, entry for entry."""

from __future__ import annotations

import pytest
import torch

from specattn_vllm.kernels import reference
from specattn_vllm.kernels.page_tables import build_page_tables

OPS = pytest.mark.parametrize("op", [build_page_tables, reference.build_page_tables], ids=["kernel", "reference"])


def oracle(bits, slots, prefix_lens, seq_lens, block_table, block_size, strides, sources, heads):
    """{(s, r, h): [pages]}, position by position."""
    groups = bits.shape[2]
    tables = {}
    for s in range(sources):
        for r, slot in enumerate(slots.tolist()):
            for h in range(heads):
                pages = tables[s, r, h] = []
                if slot < 0:
                    continue
                words = bits[s, slot, h if groups > 1 else 0].tolist()
                for p in range(int(seq_lens[r])):
                    if p >= int(prefix_lens[r]) or p >= 32 * len(words) or words[p // 32] >> (p % 32) & 1:
                        block = int(block_table[r, p // block_size])
                        pages.append(block * strides[0] + h * strides[1] + p % block_size * strides[2])
    return tables


def case(why, rows, *, groups=1, heads=2, sources=1, block_size=16, layout="LBNHC", density=0.3, words=None):
    """rows: (slot, prefix_len, seq_len)"""
    return pytest.param((rows, groups, heads, sources, block_size, layout, density, words), id=why)


CASES = [
    case("one token", [(0, 1, 1)]),
    case("one token, no selection", [(0, -1, 1)]),
    case("around a word", [(0, 31, 31), (1, 32, 32), (2, 33, 33)]),
    case("around a page edge", [(0, 15, 15), (1, 16, 16), (2, 17, 17)]),
    case("new tokens after the prefix are kept", [(0, 40, 45), (1, 32, 40)]),
    case("prefix 0 and -1 keep everything", [(0, 0, 50), (1, -1, 50)]),
    case("prefix past the sequence", [(0, 99, 60)]),
    case("prefix past the words", [(0, 90, 90)], words=2),
    case("padded rows", [(-1, 20, 30), (0, 20, 30), (1, 20, 0), (-1, -1, 0)]),
    case("slots in any order, one used twice", [(3, 60, 70), (0, 60, 66), (3, 50, 70)]),
    case("a group per head", [(0, 127, 129), (1, 64, 70)], groups=4, heads=4),
    case("a group per head, heads outermost", [(0, 100, 101)], groups=2, layout="LBHNC"),
    case("heads outermost", [(0, 100, 110), (1, 64, 64)], layout="LBHNC", heads=3),
    case("several sources", [(1, 70, 75), (0, 30, 31)], sources=3),
    case("nothing selected", [(0, 64, 64), (1, 60, 64)], density=0.0),
    case("everything selected", [(0, 64, 64)], density=1.0),
    case("big pages", [(0, 127, 128), (1, 128, 129)], block_size=128),
    case("page size that is no power of two", [(0, 70, 75)], block_size=24),
    case("around a step of 2048", [(0, 2047, 2047), (1, 2000, 2049), (2, 4099, 4100)], density=0.1),
]


def build(params, device, seed=0):
    rows, groups, heads, sources, block_size, layout, density, words = params
    gen = torch.Generator().manual_seed(seed)
    longest = max(n for _, _, n in rows)
    words = words or -(-longest // 32) + 1
    flags = torch.rand(sources, 5, groups, words, 32, generator=gen) < density
    bits = (flags.long() << torch.arange(32)).sum(-1).to(torch.int32)
    width = -(-longest // block_size)
    # Entries past the end of a row are stale, and so is the whole row of a padded request.
    table = torch.tensor([2_000_000_000, -7], dtype=torch.int32).repeat(len(rows), width + 1)
    for r, (slot, _, n) in enumerate(rows):
        if slot >= 0:
            used = -(-n // block_size)
            table[r, :used] = torch.randperm(500, generator=gen)[:used].int()
    strides = (block_size * heads, 1, heads) if layout == "LBNHC" else (heads * block_size, block_size, 1)
    column = [torch.tensor(c) for c in zip(*rows, strict=True)]
    inputs = (bits, column[0].long(), column[1].int(), column[2].int(), table)
    return [t.to(device) for t in inputs] + [block_size, strides], sources, heads, longest


@OPS
@pytest.mark.parametrize("params", CASES)
def test_equals_oracle(op, params, device, poisoned):
    inputs, sources, heads, longest = build(params, device)
    table = poisoned((sources, len(params[0]), heads, longest + 3), torch.int32, device)
    kept = poisoned((sources, len(params[0]), heads), torch.int32, device)
    op(*inputs, table, kept)
    want = oracle(*[t.cpu() if isinstance(t, torch.Tensor) else t for t in inputs], sources, heads)
    for (s, r, h), pages in want.items():
        assert kept[s, r, h] == len(pages)
        assert table[s, r, h, : len(pages)].tolist() == pages
        assert (table[s, r, h, len(pages) :] == -858993460).all()


@pytest.mark.parametrize("seed", range(20))
def test_reference_equals_oracle_at_random(seed, poisoned):
    gen = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(4):
        n = int(torch.randint(0, 140, (), generator=gen))
        prefix = int(torch.randint(-1, n + 3, (), generator=gen))
        rows.append((int(torch.randint(-1, 5, (), generator=gen)), prefix, n))
    groups = 1 + seed % 2
    layout = "LBNHC" if seed % 3 else "LBHNC"
    params = ([*rows, (0, 1, 1)], groups, 2, 2, 16, layout, 0.4, None)
    test_equals_oracle(reference.build_page_tables, params, torch.device("cpu"), poisoned)


@OPS
def test_pages_hold_the_tokens(op, device, paged, poisoned):
    """The page numbers against a real cache: what they point at are the keys and values of the kept positions."""
    lens = [37, 64]
    for layout in ("LBNHC", "LBHNC"):
        data = paged(lens, 2, 64, 16, layout, device, torch.float32)
        bits = torch.tensor([0x0F0F0F0F, -1], dtype=torch.int32, device=device).repeat(1, 2, 1, 1)
        table = poisoned((1, 2, 2, 64), torch.int32, device)
        kept = poisoned((1, 2, 2), torch.int32, device)
        slots = torch.tensor([1, 0], device=device)
        prefix = torch.tensor([30, 60], dtype=torch.int32, device=device)
        op(bits, slots, prefix, data.seq_lens, data.block_table, 16, data.page_strides, table, kept)
        for r, n in enumerate(lens):
            keep = [p for p in range(n) if p >= min(int(prefix[r]), n) or p >= 32 or 0x0F0F0F0F >> p & 1]
            for h in range(2):
                pages = data.kv_pages[table[0, r, h, : kept[0, r, h]].long()]
                assert torch.equal(pages[:, :64], data.keys[r][h, keep])
                assert torch.equal(pages[:, 64:], data.values[r][h, keep])


def test_nothing_is_written_past_width(device, poisoned):
    """A row longer than the table is a caller's error; the kernel still stays inside the row."""
    params = ([(0, -1, 40)], 1, 2, 1, 16, "LBNHC", 0.5, None)
    inputs, *_ = build(params, device)
    buffer = poisoned((1, 1, 2, 40), torch.int32, device)
    build_page_tables(*inputs, buffer[..., :24], poisoned((1, 1, 2), torch.int32, device))
    assert (buffer[..., :24] >= 0).all()
    assert (buffer[..., 24:] == -858993460).all()


@OPS
@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": torch.zeros(1, 2, 2, 2, dtype=torch.int32)}, "bits: got 2 score groups, wanted 1 or the 3 heads"),
        ({"slots": torch.zeros(1, dtype=torch.int32)}, "slots: got torch.int32, wanted torch.int64"),
        ({"kept": torch.zeros(1, 1, 2, dtype=torch.int32)}, r"kept: got shape \(1, 1, 2\)"),
        ({"block_size": 0}, "block_size: got 0"),
    ],
    ids=["groups", "slot dtype", "kept shape", "block size"],
)
def test_refuses(op, change, message):
    one = torch.ones(1, dtype=torch.int32)
    good = {
        "bits": torch.zeros(1, 2, 1, 2, dtype=torch.int32), "slots": torch.zeros(1, dtype=torch.int64),
        "prefix_lens": one, "seq_lens": one, "block_table": one[None], "block_size": 16, "page_strides": (48, 1, 3),
        "page_table": torch.zeros(1, 1, 3, 8, dtype=torch.int32), "kept": torch.zeros(1, 1, 3, dtype=torch.int32),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        op(**{**good, **change})
