"""build_page_tables: kernel and reference equal to a plain-Python oracle, entry for entry."""

from __future__ import annotations

import pytest
import torch

from specattn_vllm.kernels import reference
from specattn_vllm.kernels.selection import page_tables
from specattn_vllm.kernels.selection.page_tables import build_page_tables

OPS = pytest.mark.parametrize("op", [build_page_tables, reference.build_page_tables], ids=["kernel", "reference"])


def oracle(bits, slots, prefix_lens, seq_lens, block_table, block_size, strides, sources=None, groups=None):
    """{(s, r, g): [pages]}, position by position."""
    sources = range(bits.shape[0]) if sources is None else sources.tolist()
    groups = [list(range(bits.shape[2]))] * len(sources) if groups is None else groups.tolist()
    tables = {}
    for s, source in enumerate(sources):
        for r, slot in enumerate(slots.tolist()):
            for g, group in enumerate(groups[s]):
                pages = tables[s, r, g] = []
                if slot < 0:
                    continue
                words = bits[source, slot, group].tolist()
                for p in range(int(seq_lens[r])):
                    if p >= int(prefix_lens[r]) or p >= 32 * len(words) or words[p // 32] >> (p % 32) & 1:
                        block = int(block_table[r, p // block_size])
                        pages.append(block * strides[0] + g * strides[1] + p % block_size * strides[2])
    return tables


def case(why, rows, *, groups=1, heads=4, sources=1, block_size=16, layout="LBNHC", density=0.3, words=None):
    """rows: (slot, prefix_len, seq_len); heads are those of the cache, groups 1 or as many"""
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
    case("a group per head", [(0, 127, 129), (1, 64, 70)], groups=4),
    case("a group per head, heads outermost", [(0, 100, 101)], groups=2, heads=2, layout="LBHNC"),
    case("heads outermost", [(0, 100, 110), (1, 64, 64)], layout="LBHNC", heads=3),
    case("several sources", [(1, 70, 75), (0, 30, 31)], sources=3),
    case("nothing selected", [(0, 64, 64), (1, 60, 64)], density=0.0),
    case("everything selected", [(0, 64, 64)], density=1.0),
    case("big pages", [(0, 127, 128), (1, 128, 129)], block_size=128),
    case("page size that is no power of two", [(0, 70, 75)], block_size=24),
    case("around a chunk of 4096", [(0, 4095, 4095), (1, 4000, 4097), (2, 4096, 8200)], density=0.1),
    case("groups and sources", [(1, 40, 50), (-1, 9, 9), (0, -1, 33)], groups=2, heads=2, sources=3),
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
            table[r, :used] = torch.randperm(600, generator=gen)[:used].int()
    strides = (block_size * heads, 1, heads) if layout == "LBNHC" else (heads * block_size, block_size, 1)
    column = [torch.tensor(c) for c in zip(*rows, strict=True)]
    inputs = (bits, column[0].long(), column[1].int(), column[2].int(), table)
    return [t.to(device) for t in inputs] + [block_size, strides], (sources, len(rows), groups), longest


def check(op, inputs, table, kept, *maps):
    op(*inputs, table, kept, *maps)
    want = oracle(*[t.cpu() if isinstance(t, torch.Tensor) else t for t in (*inputs, *maps)])
    for (s, r, g), pages in want.items():
        assert kept[s, r, g] == len(pages)
        assert table[s, r, g, : len(pages)].tolist() == pages
        assert (table[s, r, g, len(pages) :] == -858993460).all()


@OPS
@pytest.mark.parametrize("params", CASES)
def test_equals_oracle(op, params, device, poisoned):
    inputs, shape, longest = build(params, device)
    check(op, inputs, poisoned((*shape, longest + 3), torch.int32, device), poisoned(shape, torch.int32, device))


# (sources, groups): source of each table, group of each of its heads
MAPS = [
    pytest.param([1, 0, 1, 2], [[0, 1], [1, 1], [1, 0], [0, 0]], id="more tables than sources, fewer heads"),
    pytest.param([2], [[2, 0, 2, 1, 0]], id="one table of more heads than groups"),
    pytest.param([1, 1], [[2], [0]], id="one list for all heads"),
    pytest.param([], [], id="no table"),
]


@OPS
@pytest.mark.parametrize("sources, groups", MAPS)
@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC"])
def test_maps_choose_the_bits_and_not_the_pages(op, sources, groups, layout, device, poisoned):
    """Rows of all kinds, in tables that are parts of larger buffers, through maps that are parts too."""
    rows = [(1, 40, 50), (-1, 9, 9), (0, -1, 33), (4, 95, 100), (2, 64, 64), (3, 5, 0)]
    heads = len(groups[0]) if groups else 2
    inputs, _, longest = build((rows, 3, heads, 3, 16, layout, 0.4, None), device)
    shape = (len(sources), len(rows), heads)
    table = poisoned((shape[0] + 1, shape[1] + 2, heads + 1, longest + 7), torch.int32, device)
    kept = poisoned(table.shape[:3], torch.int32, device)
    part = (slice(shape[0]), slice(1, shape[1] + 1), slice(heads))
    # What lies beside the maps is no source and no group.
    source_map = torch.tensor([*sources, 1000], dtype=torch.int32, device=device)[: shape[0]]
    group_map = torch.full((shape[0], heads + 1), 1000, dtype=torch.int32, device=device)[:, :heads]
    if groups:
        group_map[:] = torch.tensor(groups, dtype=torch.int32)
    check(op, inputs, table[part][..., : longest + 3], kept[part], source_map, group_map)
    table[part] = kept[part] = -858993460
    assert (table == -858993460).all() and (kept == -858993460).all()


@OPS
def test_maps_onto_themselves_are_no_maps(op, device, poisoned):
    params = ([(0, 70, 75), (3, 31, 40), (-1, 5, 5)], 2, 2, 3, 16, "LBNHC", 0.4, None)
    inputs, shape, longest = build(params, device)
    results = []
    identity = (torch.arange(3), torch.arange(2).repeat(3, 1))
    for maps in ((), [m.to(device, torch.int32) for m in identity]):
        table, kept = poisoned((*shape, longest), torch.int32, device), poisoned(shape, torch.int32, device)
        op(*inputs, table, kept, *maps)
        results.append((table, kept))
    assert all(torch.equal(plain, mapped) for plain, mapped in zip(*results, strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_chunks_at_random(seed, device, poisoned, monkeypatch):
    """Chunks, and steps of the count before them, so small that every row has several."""
    monkeypatch.setattr(page_tables, "CHUNK", 64)
    monkeypatch.setattr(page_tables, "COUNT_STEP", 2 << seed % 3)
    inputs, shape, longest = build(random_params(seed, 300), device, seed)
    table, kept = poisoned((*shape, longest), torch.int32, device), poisoned(shape, torch.int32, device)
    check(build_page_tables, inputs, table, kept)


@OPS
def test_outputs_are_views(op, device, poisoned):
    """A part of larger buffers in every dimension but the last; the rest of them stays as it is."""
    inputs, (sources, rows, groups), _ = build(random_params(1, 100), device)
    table = poisoned((sources + 1, rows + 2, groups + 1, 150), torch.int32, device)
    kept = poisoned((sources + 1, rows + 2, groups + 1), torch.int32, device)
    part = (slice(sources), slice(1, rows + 1), slice(groups))
    check(op, inputs, table[part][..., :120], kept[part])
    table[part] = kept[part] = -858993460
    assert (table == -858993460).all() and (kept == -858993460).all()


def random_params(seed, longest=140):
    gen = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(4):
        n = int(torch.randint(0, longest, (), generator=gen))
        prefix = int(torch.randint(-1, n + 3, (), generator=gen))
        rows.append((int(torch.randint(-1, 5, (), generator=gen)), prefix, n))
    return [*rows, (0, 1, 1)], 1 + seed % 2, 2, 2, 16, "LBNHC" if seed % 3 else "LBHNC", 0.4, None


@pytest.mark.parametrize("seed", range(20))
def test_reference_equals_oracle_at_random(seed, poisoned):
    test_equals_oracle(reference.build_page_tables, random_params(seed), torch.device("cpu"), poisoned)


@OPS
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC"])
def test_pages_hold_the_tokens(op, groups, layout, device, paged, poisoned):
    """The page numbers against a real cache: what they point at are the keys and values of the kept positions; a table
    that all heads share is that of head 0, and head 1 lies one head stride on."""
    lens = [37, 64]
    data = paged(lens, 2, 64, 16, layout, device, torch.float32)
    bits = torch.tensor([0x0F0F0F0F, -1], dtype=torch.int32, device=device).repeat(1, 2, groups, 1)
    table = poisoned((1, 2, groups, 64), torch.int32, device)
    kept = poisoned((1, 2, groups), torch.int32, device)
    slots = torch.tensor([1, 0], device=device)
    prefix = torch.tensor([30, 60], dtype=torch.int32, device=device)
    op(bits, slots, prefix, data.seq_lens, data.block_table, 16, data.page_strides, table, kept)
    for r, n in enumerate(lens):
        keep = [p for p in range(n) if p >= min(int(prefix[r]), n) or p >= 32 or 0x0F0F0F0F >> p & 1]
        for h in range(2):
            g, shift = (h, 0) if groups == 2 else (0, h * data.page_strides[1])
            pages = data.kv_pages[table[0, r, g, : kept[0, r, g]].long() + shift]
            assert torch.equal(pages[:, :64], data.keys[r][h, keep])
            assert torch.equal(pages[:, 64:], data.values[r][h, keep])


@OPS
def test_a_row_longer_than_the_table_is_cut(op, device, poisoned):
    """A caller's error; nothing is written past width, and nobody is told to read past it."""
    params = ([(0, -1, 40), (0, 30, 40)], 1, 2, 1, 16, "LBNHC", 1.0, None)
    inputs, shape, _ = build(params, device)
    buffer, kept = poisoned((*shape, 40), torch.int32, device), poisoned(shape, torch.int32, device)
    op(*inputs, buffer[..., :24], kept)
    assert kept.tolist() == [[[24], [24]]]
    assert (buffer[..., :24] >= 0).all()
    assert (buffer[..., 24:] == -858993460).all()


def test_offsets_beyond_32_bits(device, poisoned):
    """Rows that lie more than 2^31 elements apart; most of the storage is never touched."""
    params = ([(0, 40, 45), (1, 20, 30)], 1, 2, 2, 16, "LBNHC", 0.5, None)
    inputs, (sources, rows, groups), _ = build(params, device)
    far = torch.empty(2**31 + 64, dtype=torch.int32, device=device)
    table = far.as_strided((sources, rows, groups, 48), (2**31 - 64, 64, 64, 1))
    table.fill_(-858993460)
    check(build_page_tables, inputs, table, poisoned((sources, rows, groups), torch.int32, device))


def maps(sources, groups):
    return {name: torch.tensor(m, dtype=torch.int32) for name, m in (("sources", sources), ("groups", groups))}


@OPS
@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": torch.zeros(1, 2, 2, 2, dtype=torch.int32)}, r"page_table: got shape \(1, 1, 1, 8\)"),
        ({"slots": torch.zeros(1, dtype=torch.int32)}, "slots: got torch.int32, wanted torch.int64"),
        ({"kept": torch.zeros(1, 1, 2, dtype=torch.int32)}, r"kept: got shape \(1, 1, 2\)"),
        ({"block_size": 0}, "block_size: got 0"),
        ({"sources": torch.zeros(1, dtype=torch.int32)}, "groups: got NoneType, wanted given with sources"),
        ({"groups": torch.zeros(1, 1, dtype=torch.int32)}, "groups: got Tensor, wanted given with sources"),
        (maps([0], [[0, 0]]), r"page_table: got shape \(1, 1, 1, 8\), wanted shape \(1, 1, 2, 'any'\)"),
        (maps([0, 0], [[0], [0]]), r"page_table: got shape \(1, 1, 1, 8\), wanted shape \(2, 1, 1, 'any'\)"),
        (maps([0, 0], [[0]]), r"groups: got shape \(1, 1\), wanted shape \(2, 'any'\)"),
        (
            maps([0], [[0]]) | {"bits": torch.zeros(0, 2, 1, 2, dtype=torch.int32)},
            r"bits: got shape \(0, 2, 1, 2\), wanted a source",
        ),
    ],
    ids=[
        "groups",
        "slot dtype",
        "kept shape",
        "block size",
        "no groups",
        "no sources",
        "heads of the map",
        "tables of the map",
        "maps of two sizes",
        "nothing to map to",
    ],
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
