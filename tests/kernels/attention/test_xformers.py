"""The xformers executor: against our reference and kernels on a GPU; what it refuses, and its views, anywhere."""

from __future__ import annotations

import os

import pytest
import torch

from specattn_vllm.executors import xformers as executor
from specattn_vllm.kernels import reference

REASON = executor.unavailable() or ("TRITON_INTERPRET is set" if os.environ.get("TRITON_INTERPRET") == "1" else None)
DEVICE = torch.device("cuda")
DTYPES = [torch.bfloat16, torch.float16]


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(REASON is not None, reason=f"xformers: {REASON}")(test))


def case(why, lens, q_lens, *, heads=2, ratio=4, size=128, block_size=16, density=0.03, max_query_len=None):
    """lens: tokens of each request, the new ones included; the rest is chosen with a density of tokens."""
    return pytest.param((lens, q_lens, heads, ratio, size, block_size, density, max_query_len or max(q_lens)), id=why)


CASES = [
    case("decode", [33, 160, 1], [1, 1, 1]),
    case("verification", [100, 517, 6], [6, 6, 6]),
    case("verification, head size 64", [100, 517, 40], [6, 6, 6], size=64),
    case("ragged query rows", [60, 300, 45, 90, 16], [3, 5, 0, 1, 2]),
    case("more rows than the longest", [60, 300], [3, 2], max_query_len=8),
    case("new tokens over three blocks", [68, 129], [16, 16], ratio=2, size=64),
    case("no GQA", [80, 200], [4, 2], heads=3, ratio=1),
    case("more query rows than a tile", [300, 200], [13, 16], ratio=8),
    case("blocks of 32", [300, 65], [5, 5], block_size=32),
    case("blocks of 64", [1000, 65], [5, 5], block_size=64, density=0.005),
    case("blocks of 48", [300, 49], [5, 5], block_size=48),
    case("split over the context", [3000, 20], [6, 4], density=0.01),
    case("everything", [300, 47], [6, 6], density=1.0),
]


def build(paged, params, dtype, seed=0):
    """A cache, a query with rows of padding, and the tables of both granularities for the same blocks."""
    lens, q_lens, heads, ratio, size, block_size, density, _ = params
    gen = torch.Generator().manual_seed(seed)
    data = paged(lens, heads, size, block_size, "LBNHC", DEVICE, dtype)
    starts = torch.tensor([0, *q_lens]).cumsum(0).int().to(DEVICE)
    query = torch.randn(sum(q_lens) + 3, heads * ratio, size, generator=gen).to(dtype).to(DEVICE)
    rows, width = data.block_table.shape
    table = torch.full((rows, 1, width), 2_000_000_000, dtype=torch.int32)
    pages = torch.full((rows, 1, width * block_size), 2_000_000_000, dtype=torch.int32)
    kept = torch.zeros(rows, 1, dtype=torch.int32)
    for r, (n, new) in enumerate(zip(lens, q_lens, strict=True)):
        chosen = torch.rand(n, generator=gen) < density
        chosen[n - max(new, 1) :] = True
        blocks = torch.unique(chosen.nonzero()[:, 0] // block_size)
        p = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()
        p = p[p < n]
        ids = data.block_table[r].cpu()
        table[r, 0, : len(blocks)] = ids[blocks]
        block, _, token = data.page_strides
        pages[r, 0, : len(p)] = (ids[p // block_size] * block + p % block_size * token).int()
        kept[r] = len(p)
    return data, query, starts, table.to(DEVICE), pages.to(DEVICE), kept.to(DEVICE)


def outputs(query, poisoned):
    return poisoned(query.shape, query.dtype, DEVICE), poisoned(query.shape[:2], torch.float32, DEVICE)


def compare(got, want, close, dtype):
    (out, lse), (want_out, want_lse) = got, want
    owned = ~want_lse.isnan()
    assert torch.equal(owned, ~lse.isnan()), "the two wrote different rows"
    assert torch.equal(owned[..., None].expand_as(out), ~out.isnan())
    close("out", out[owned], want_out[owned], dtype)
    close("lse", lse[owned], want_lse[owned])


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("params", CASES)
def test_matches_reference(params, dtype, paged, poisoned, close):
    data, query, starts, table, pages, kept = build(paged, params, dtype)
    scale, longest = query.shape[2] ** -0.5, params[-1]
    got, want = outputs(query, poisoned), outputs(query, poisoned)
    executor.sparse_attention(query, data.kv_cache, table, kept, starts, scale, got[0], longest, got[1])
    reference.sparse_attention(query, data.kv_cache, pages, kept, starts, scale, want[0], longest, want[1])
    compare(got, want, close, dtype)
    alone, _ = outputs(query, poisoned)
    executor.sparse_attention(query, data.kv_cache, table, kept, starts, scale, alone, longest)
    assert torch.equal(alone.isnan(), got[0].isnan())
    close("out", alone[: int(starts[-1])], got[0][: int(starts[-1])], dtype)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_other_executors_stay_untouched(dtype, paged, poisoned, close):
    data, query, starts, table, pages, kept = build(paged, CASES[3].values[0], dtype)
    kept[1], kept[4] = 0, -1
    got, want = outputs(query, poisoned), outputs(query, poisoned)
    executor.sparse_attention(query, data.kv_cache, table, kept, starts, 0.1, got[0], 5, got[1])
    reference.sparse_attention(query, data.kv_cache, pages, kept, starts, 0.1, want[0], 5, want[1])
    assert want[0][3:8].isnan().all()
    compare(got, want, close, dtype)


@on_gpu
@pytest.mark.parametrize("params", CASES)
def test_full_tables_match_dense_attention(params, paged, poisoned, close):
    """An oracle that knows no tables of ours: torch's own attention over the whole context."""
    from specattn_vllm.kernels.selection.block_tables import build_block_tables

    data, query, starts, *_ = build(paged, params, torch.float16)
    rows, width = data.block_table.shape
    none = torch.full((rows,), -1, dtype=torch.int32, device=DEVICE)
    table = poisoned((1, rows, 1, width), torch.int32, DEVICE)
    kept = poisoned((1, rows, 1), torch.int32, DEVICE)
    bits = torch.zeros(1, rows, 1, 1, dtype=torch.int32, device=DEVICE)
    slots = torch.arange(rows, device=DEVICE)
    build_block_tables(bits, slots, none, data.seq_lens, data.block_table, params[5], (1, 1, 1), table, kept)
    scale = query.shape[2] ** -0.5
    (out, _), (want, _) = outputs(query, poisoned), outputs(query, poisoned)
    executor.sparse_attention(query, data.kv_cache, table[0], kept[0], starts, scale, out, params[-1])
    reference.dense_attention(query, data.kv_cache, data.block_table, data.seq_lens, starts, scale, want)
    last = int(starts[-1])
    close("out", out[:last], want[:last], torch.float16)
    assert out[last:].isnan().all()


@on_gpu
@pytest.mark.parametrize("params", CASES)
def test_matches_our_kernel(params, paged, poisoned, close):
    from specattn_vllm.kernels.attention.sparse_attention import sparse_attention

    data, query, starts, table, pages, kept = build(paged, params, torch.float16)
    scale = query.shape[2] ** -0.5
    got, want = outputs(query, poisoned), outputs(query, poisoned)
    executor.sparse_attention(query, data.kv_cache, table, kept, starts, scale, got[0], params[-1], got[1])
    sparse_attention(query, data.kv_cache, pages, kept, starts, scale, want[0], params[-1], want[1])
    compare(got, want, close, torch.float16)


@on_gpu
def test_never_waits_and_replays_with_other_contents(paged, poisoned, close):
    """One captured graph follows tables, counts and row starts that change under it."""
    params = CASES[3].values[0]
    data, query, starts, table, _, kept = build(paged, params, torch.bfloat16)
    out, lse = outputs(query, poisoned)
    args = (query, data.kv_cache, table, kept, starts, 0.1, out, 5, lse)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        executor.sparse_attention(*args)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            executor.sparse_attention(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        executor.sparse_attention(*args)
    params = (params[0], [5, 1, 2, 3, 0], *params[2:])
    _, query_2, starts_2, table_2, pages_2, kept_2 = build(paged, params, torch.bfloat16, seed=1)
    for old, new in ((query, query_2), (starts, starts_2), (table, table_2), (kept, kept_2)):
        old.copy_(new)
    out.fill_(torch.nan)
    lse.fill_(torch.nan)
    graph.replay()
    want = outputs(query, poisoned)
    reference.sparse_attention(query, data.kv_cache, pages_2, kept, starts, 0.1, want[0], 5, want[1])
    compare((out, lse), want, close, torch.bfloat16)


def test_keys_and_values_are_views(paged):
    data = paged([40, 20], 3, 64, 16, "LBNHC", torch.device("cpu"), torch.float16)
    for part, wanted in zip(executor._as_sequence(data.kv_cache, 4), (data.keys, data.values), strict=True):
        assert part.shape == (1, data.kv_cache.shape[0] * 16, 3, 4, 64)
        assert part.untyped_storage().data_ptr() == data.kv_cache.untyped_storage().data_ptr()
        for r, n in enumerate(data.seq_lens.tolist()):
            p = torch.arange(n)
            tokens = part[0, data.block_table[r, p // 16].long() * 16 + p % 16]
            for j in range(4):
                assert torch.equal(tokens[:, :, j].transpose(0, 1), wanted[r])


def refused(paged, layout="LBNHC", block_size=16, dtype=torch.float16, **change):
    data = paged([40, 20], 2, 64, block_size, layout, torch.device("cpu"), dtype)
    query = torch.zeros(2, 4, 64, dtype=dtype)
    good = {
        "query": query, "kv_cache": data.kv_cache, "page_table": torch.zeros(2, 1, 3, dtype=torch.int32),
        "kept": torch.ones(2, 1, dtype=torch.int32), "query_start_loc": torch.arange(3, dtype=torch.int32),
        "scale": 1.0, "out": query.clone(), "max_query_len": 1,
    }  # fmt: skip
    executor.sparse_attention(**{**good, **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layout": "LBHNC"}, r"kv_cache: got strides .* needs the LBNHC layout \(VLLM_KV_CACHE_LAYOUT\)"),
        ({"block_size": 24}, r"kv_cache: got block size 24, wanted a multiple of 16 \(--block-size\)"),
        ({"dtype": torch.float32}, "query: got torch.float32, wanted torch.float16 or torch.bfloat16"),
        ({"max_query_len": 17}, "max_query_len: got 17, wanted at most 16"),
        (
            {"page_table": torch.zeros(2, 2, 3, dtype=torch.int32), "kept": torch.ones(2, 2, dtype=torch.int32)},
            "page_table: got 2 groups, wanted 1",
        ),
        ({"kept": torch.ones(3, 1, dtype=torch.int32)}, r"kept: got shape \(3, 1\)"),
    ],
    ids=["layout", "block size", "dtype", "max_query_len", "groups", "shape"],
)
def test_refuses(paged, change, message):
    """Before xformers is needed, so also where it is not installed."""
    with pytest.raises(ValueError, match=message):
        refused(paged, **change)


@pytest.mark.parametrize(
    "capability, version, message",
    [
        ((7, 5), "0.0.35", "compute capability 8.0"),
        ((9, 0), None, r"xformers is not installed: pip install 'xformers>=0\.0\.35'"),
        ((9, 0), "0.0.34", r"xformers 0\.0\.34 is too old: pip install 'xformers>=0\.0\.35'"),
        ((9, 0), "0.0.36+git", r"xformers 0\.0\.36\+git cannot be used \(no such part\)"),
    ],
    ids=["old GPU", "not installed", "too old", "another one"],
)
def test_says_why_it_is_unavailable(monkeypatch, capability, version, message):
    def installed(name):
        if version is None:
            raise executor.metadata.PackageNotFoundError(name)
        return version

    def broken():
        raise AttributeError("no such part")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(executor.metadata, "version", installed)
    monkeypatch.setattr(executor, "_xformers", broken)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(executor.unavailable())


def test_is_unavailable_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert executor.unavailable() == "needs an NVIDIA GPU, and torch sees none"


@pytest.mark.parametrize("heads, size", [(6, 64), (3, 128), (10, 128)])
def test_query_rows_packed_and_unpacked(heads, size, place, poisoned):
    """Tokens come last among a request's rows; back in place they are equal, and nothing else is touched."""
    device, dtype = place
    q_lens, counts, each = [3, 0, 1, 4, 2], [9, 9, 0, 8, -1], 4
    starts = torch.tensor([0, *q_lens]).cumsum(0).int().to(device)
    query = poisoned((13, heads + 1, size), dtype, device)[:, :heads]  # three rows of padding, and a stride between
    query[:10] = torch.randn(10, heads, size).to(dtype)
    packed = poisoned((5, each, heads, size), dtype, device)
    executor.pack_queries(query, starts, packed)
    for r, n in enumerate(q_lens):
        assert torch.equal(packed[r, each - n :], query[starts[r] : starts[r + 1]])
        assert (packed[r, : each - n] == 0).all()

    kept = torch.tensor(counts, dtype=torch.int32, device=device)
    packed_lse = torch.randn(5 * each, heads, device=device).T
    out, lse = poisoned((13, heads, size), dtype, device), poisoned((13, heads), torch.float32, device)
    # What comes out of attention may have another order of dimensions in memory.
    executor.unpack_outputs(packed.transpose(1, 2).contiguous().transpose(1, 2), packed_lse, starts, kept, out, lse)
    alone = poisoned((13, heads, size), dtype, device)
    executor.unpack_outputs(packed, None, starts, kept[:, None].expand(-1, 2).contiguous()[:, 0], alone, None)
    assert torch.equal(alone.nan_to_num(-9.0), out.nan_to_num(-9.0))
    owner = [r for r, n in enumerate(q_lens) for _ in range(n)] + [-1] * 3
    for t, r in enumerate(owner):
        if r < 0 or counts[r] <= 0:
            assert out[t].isnan().all() and lse[t].isnan().all()
            continue
        row = r * each + each - int(starts[r + 1]) + t
        assert torch.equal(out[t], query[t])
        assert torch.equal(lse[t], packed_lse[:, row])
