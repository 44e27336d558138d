"""sparse_attention: kernel against reference, reference against torch on the selected tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from specattn_vllm.kernels import reference
from specattn_vllm.kernels.attention.sparse_attention import LaunchConfig, sparse_attention

STALE_PAGE = 2_000_000_000


def case(why, q_lens, kept, ratio=2, size=64, layout="LBNHC", max_query_len=None, heads=None):
    """kept: [R][G] entries, at least q_len each where not 0; heads: G if None, else G is 1 and shared by them."""
    return pytest.param((q_lens, kept, ratio, size, layout, max_query_len or max(q_lens), heads), id=why)


CASES = [
    case("one query, one entry", [1], [[1]], ratio=1),
    case("around a step of 64 entries", [1, 1, 1], [[63], [64], [65]], ratio=4),
    case("odd counts", [1, 1, 1], [[31, 127], [32, 128], [33, 129]]),
    case("heads of a request differ", [3, 2], [[40, 9], [5, 70]], size=128),
    case("verification: several rows per request", [4, 4], [[50, 50], [21, 90]]),
    case("ragged rows, one request without any", [5, 0, 1, 3], [[20, 20], [30, 30], [40, 40], [3, 3]]),
    case("entries are the new tokens only", [4], [[4, 4]], ratio=1, layout="LBHNC"),
    case("another executor's head and request", [2, 2, 2], [[30, 0], [0, 0], [0, 12]]),
    case("GQA 8, rows fill a tile", [8], [[100]], ratio=8),
    case("more rows than a tile", [13], [[80]], ratio=8),
    case("tile larger than the rows", [1, 2], [[33, 34], [35, 36]], max_query_len=16),
    case("rows split within a token's heads", [11], [[60, 61]], ratio=6),
    case("splits without entries beside a long row", [1, 1], [[900], [3]], ratio=1),
    case("16 rows over many splits", [16], [[777]], ratio=4, size=128, layout="LBHNC"),
    case("head size 96", [5, 1], [[70, 33], [9, 400]], ratio=3, size=96),
    case("head size 192, shared", [5, 1], [[70], [600]], size=192, heads=2, layout="LBHNC"),
    case("head size 256", [5, 1], [[70, 33], [9, 400]], ratio=3, size=256),
    case("shared by the heads", [3, 1], [[40], [130]], heads=3),
    case("shared by the heads, heads outermost", [2, 0, 4], [[65], [9], [200]], layout="LBHNC", heads=2, ratio=4),
    case("shared by the heads, padded rows", [2, 0, 2, 0], [[30], [0], [-1], [0]], heads=2, size=128),
]


def build(paged, params, device, dtype, seed=0):
    """A cache of one long request, and tables of randomly chosen pages with stale entries behind them."""
    q_lens, kept, ratio, size, layout, _, heads = params
    groups = len(kept[0])
    heads = heads or groups
    gen = torch.Generator().manual_seed(seed)
    longest = max(max(k) for k in kept)
    data = paged([longest + 50], heads, size, 16, layout, device, dtype)
    table = torch.full((len(kept), groups, longest + 5), STALE_PAGE, dtype=torch.int32)
    chosen = {}
    blocks = data.block_table.cpu()
    block, head, token = data.page_strides
    for r, counts in enumerate(kept):
        for h, n in enumerate(counts):
            p = torch.randperm(longest + 50, generator=gen)[: max(n, 0)].sort().values
            chosen[r, h] = p.to(device)
            table[r, h, : len(p)] = (blocks[0, p // 16] * block + h * head + p % 16 * token).int()
    starts = torch.tensor([0, *q_lens]).cumsum(0).int()
    tokens = sum(q_lens) + 3  # padding rows of a captured batch
    query = torch.randn(tokens, heads * ratio, size, generator=gen).to(dtype).to(device)
    to = lambda t: t.to(device)  # noqa: E731
    return data, chosen, query, (to(table), to(torch.tensor(kept, dtype=torch.int32)), to(starts), size**-0.5)


@pytest.mark.parametrize("params", CASES)
def test_kernel_matches_reference(params, place, paged, poisoned, close):
    device, dtype = place
    data, _, query, rest = build(paged, params, device, dtype)
    results = []
    for op in (sparse_attention, reference.sparse_attention):
        out = poisoned(query.shape, dtype, device)
        lse = poisoned(query.shape[:2], torch.float32, device)
        op(query, data.kv_cache, *rest, out, params[5], lse)
        results.append((out, lse))
    (out, lse), (want_out, want_lse) = results
    owned = ~want_lse.isnan()
    assert torch.equal(owned, ~lse.isnan()), "the two wrote different rows"
    assert torch.equal(owned[..., None].expand_as(out), ~out.isnan())
    close("out", out[owned], want_out[owned], dtype)
    close("lse", lse[owned], want_lse[owned])


@pytest.mark.parametrize("params", CASES)
def test_reference_matches_torch(params, paged, poisoned, close):
    """Against torch on the chosen keys and values, taken from the unpaged tensors; skipped rows stay untouched."""
    q_lens, kept, ratio, _, _, max_query_len, heads = params
    cpu = torch.device("cpu")
    data, chosen, query, rest = build(paged, params, cpu, torch.float32)
    out = poisoned(query.shape, torch.float32, cpu)
    lse = poisoned(query.shape[:2], torch.float32, cpu)
    reference.sparse_attention(query, data.kv_cache, *rest, out, max_query_len, lse)
    begin = 0
    for r, n in enumerate(q_lens):
        rows = slice(begin, begin + n)
        begin += n
        for h in range(heads or len(kept[r])):
            g = h if heads is None else 0
            count = kept[r][g]
            mine = slice(h * ratio, (h + 1) * ratio)
            if count <= 0:
                assert out[rows, mine].isnan().all() and lse[rows, mine].isnan().all()
                continue
            k, v = data.keys[0][h, chosen[r, g]], data.values[0][h, chosen[r, g]]
            mask = torch.ones(n, count, dtype=torch.bool).tril(count - n)
            want = F.scaled_dot_product_attention(
                query[rows, mine].transpose(0, 1), k.expand(ratio, -1, -1), v.expand(ratio, -1, -1), attn_mask=mask
            )
            close("out", out[rows, mine].transpose(0, 1), want, torch.float32)
            logits = (query[rows, mine].transpose(0, 1) @ k.T * rest[-1]).masked_fill(~mask, -torch.inf)
            close("lse", lse[rows, mine].T, logits.logsumexp(-1))
    assert out[begin:].isnan().all() and lse[begin:].isnan().all()


@pytest.mark.parametrize("op", [sparse_attention, reference.sparse_attention], ids=["kernel", "reference"])
def test_token_that_sees_nothing(op, device, poisoned):
    """kept < q_len is invalid input, and must come out as zeros, not as NaN that spreads through the model."""
    pages = torch.randn(10, 1, 1, 128, device=device)
    query = torch.randn(3, 1, 64, device=device)
    table = torch.tensor([[[4, 7, STALE_PAGE]]], dtype=torch.int32, device=device)
    kept, starts = (torch.tensor(v, dtype=torch.int32, device=device) for v in ([[2]], [0, 3]))
    out, lse = poisoned((3, 1, 64), torch.float32, device), poisoned((3, 1), torch.float32, device)
    op(query, pages, table, kept, starts, 0.1, out, 3, lse)
    assert (out[0] == 0).all() and lse[0] == -torch.inf
    assert torch.equal(out[1, 0], pages[4, 0, 0, 64:])  # sees one entry: its value
    assert lse[1:].isfinite().all()


def test_without_lse(place, paged, poisoned, close):
    device, dtype = place
    params = ([2, 3], [[30, 31], [70, 3]], 2, 64, "LBNHC", 3, None)
    data, _, query, rest = build(paged, params, device, dtype)
    out, want = (poisoned(query.shape, dtype, device) for _ in range(2))
    sparse_attention(query, data.kv_cache, *rest, out, 3)
    reference.sparse_attention(query, data.kv_cache, *rest, want, 3)
    close("out", out[:5], want[:5], dtype)
    assert out[5:].isnan().all()


@pytest.mark.parametrize(
    "config",
    [
        LaunchConfig(block_n=16, num_warps=1, num_stages=1, waves=1),
        LaunchConfig(block_n=32, num_warps=4, num_stages=4, waves=8),
        LaunchConfig(block_n=128, num_warps=8, num_stages=2, waves=0),
        LaunchConfig(block_n=16, num_warps=2, num_stages=3, waves=64),
    ],
    ids=["small", "many rows", "one split", "many splits"],
)
def test_config_does_not_change_results(config, place, paged, poisoned, close):
    device, dtype = place
    if dtype == torch.float32 and device.type == "cuda" and config.block_n * config.num_stages > 128:
        pytest.skip("fp32 steps of this size do not fit in shared memory")
    params = ([3, 0, 4], [[90], [20], [170]], 4, 64, "LBNHC", 4, 2)
    data, _, query, rest = build(paged, params, device, dtype)
    results = []
    for op, extra in ((sparse_attention, {"config": config}), (reference.sparse_attention, {})):
        out, lse = poisoned(query.shape, dtype, device), poisoned(query.shape[:2], torch.float32, device)
        op(query, data.kv_cache, *rest, out, 4, lse, **extra)
        results.append((out, lse))
    (out, lse), (want_out, want_lse) = results
    close("out", out[:7], want_out[:7], dtype)
    close("lse", lse[:7], want_lse[:7])
    assert out[7:].isnan().all() and lse[7:].isnan().all()


def test_table_and_counts_as_views(place, paged, poisoned, close):
    """Both come as slices of buffers for more sources, rows, groups and entries than a step has."""
    device, dtype = place
    params = ([2, 3], [[30, 31], [70, 3]], 2, 64, "LBNHC", 3, None)
    data, _, query, (table, kept, *rest) = build(paged, params, device, dtype)
    big_table = poisoned((2, 5, 3, table.shape[2] + 7), torch.int32, device)
    big_kept = poisoned((2, 5, 3), torch.int32, device)
    wide_table, wide_kept = big_table[1, 1:5:2, :2, : table.shape[2]], big_kept[1, 1:5:2, :2]
    wide_table.copy_(table)
    wide_kept.copy_(kept)
    out, want = (poisoned(query.shape, dtype, device) for _ in range(2))
    sparse_attention(query, data.kv_cache, wide_table, wide_kept, *rest, out, 3)
    reference.sparse_attention(query, data.kv_cache, table, kept, *rest, want, 3)
    close("out", out[:5], want[:5], dtype)


@pytest.mark.parametrize("op", [sparse_attention, reference.sparse_attention], ids=["kernel", "reference"])
def test_rows_beyond_2_31_elements(op, device, poisoned, close):
    """page * row stride overflows int32 here. The tensor is virtual memory but for the rows written."""
    pages = torch.empty(2**24 + 64, 128, dtype=torch.float16, device=device)
    far = torch.tensor([3, 2**24 + 1, 2**24 + 60], dtype=torch.int32)
    assert int(far[1]) * pages.stride(0) > 2**31
    rows = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).half().to(device)
    for page, row in zip(far.tolist(), rows, strict=True):
        pages[page] = row
    query = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(1)).half().to(device)
    kept, starts = (torch.tensor(v, dtype=torch.int32, device=device) for v in ([[3]], [0, 1]))
    out = poisoned((1, 2, 64), torch.float16, device)
    op(query, pages.view(-1, 1, 1, 128), far.view(1, 1, 3).to(device), kept, starts, 0.125, out, 1)
    weights = (query[0].float() @ rows[:, :64].float().T * 0.125).softmax(-1)
    close("out", out[0], weights @ rows[:, 64:].float(), torch.float16)


@pytest.mark.parametrize("op", [sparse_attention, reference.sparse_attention], ids=["kernel", "reference"])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"kv_cache": torch.empty(3, 2, 3, 64)}, r"kv_cache: got shape \(3, 2, 3, 64\), wanted shape .*128\)"),
        ({"kv_cache": torch.empty(3, 2, 3, 128, dtype=torch.float16)}, "kv_cache: got torch.float16"),
        (
            {"kv_cache": torch.empty(3, 2, 3, 192)[..., :128]},
            "kv_cache: got strides .* multiples of a row of 128",
        ),
        ({"query_start_loc": torch.zeros(1, dtype=torch.int32)}, "query_start_loc: got shape"),
        ({"max_query_len": 0}, "max_query_len: got 0"),
        ({"query": torch.empty(2, 3, 64), "out": torch.empty(2, 3, 64)}, "kv_cache: got 2 heads for 3 query heads"),
        (
            {"page_table": torch.zeros(1, 3, 8, dtype=torch.int32), "kept": torch.ones(1, 3, dtype=torch.int32)},
            "page_table: got 3 groups, wanted 1 or the 2 heads",
        ),
        ({"kept": torch.ones(1, 1, dtype=torch.int32)}, r"kept: got shape \(1, 1\)"),
    ],
    ids=["row size", "dtype", "strides", "starts", "max_query_len", "uneven heads", "groups", "kept"],
)
def test_refuses(op, change, message):
    good = {
        "query": torch.empty(2, 4, 64), "kv_cache": torch.empty(3, 2, 3, 128),
        "page_table": torch.zeros(1, 2, 8, dtype=torch.int32), "kept": torch.ones(1, 2, dtype=torch.int32),
        "query_start_loc": torch.tensor([0, 2], dtype=torch.int32), "scale": 1.0, "out": torch.empty(2, 4, 64),
        "max_query_len": 2,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        op(**{**good, **change})
