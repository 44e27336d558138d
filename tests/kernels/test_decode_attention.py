"""decode_attention: kernel against reference, reference against torch's own attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from specattn_vllm.kernels import reference
from specattn_vllm.kernels.decode_attention import decode_attention


def case(why, lens, heads, ratio, size, block_size, layout):
    return pytest.param((lens, heads, ratio, size, block_size, layout), id=why)


CASES = [
    case("one key", [1], 1, 1, 64, 16, "LBNHC"),
    case("around a page edge", [15, 16, 17], 2, 2, 64, 16, "LBNHC"),
    case("around a step of 64 keys", [63, 64, 65], 2, 4, 64, 16, "LBHNC"),
    case("around a word of the mask", [31, 32, 33], 2, 1, 128, 16, "LBHNC"),
    case("around 128 with a big page", [127, 128, 129], 1, 8, 64, 128, "LBNHC"),
    case("ragged, longest last", [3, 100, 257], 2, 2, 64, 16, "LBHNC"),
    case("padded row between requests", [40, 0, 70], 2, 2, 64, 16, "LBNHC"),
    case("only padded rows", [0, 0], 2, 4, 64, 16, "LBNHC"),
    case("many splits", [1000], 1, 4, 64, 16, "LBNHC"),
    case("splits without keys beside a long row", [70, 900], 1, 2, 128, 16, "LBHNC"),
    case("more query heads than a tile of 16", [50], 1, 24, 64, 16, "LBNHC"),
    case("page size that is no power of two", [50, 49], 3, 1, 64, 24, "LBNHC"),
]


def build(paged, params, device, dtype):
    lens, heads, ratio, size, block_size, layout = params
    data = paged(lens, heads, size, block_size, layout, device, dtype)
    gen = torch.Generator().manual_seed(1)
    query = (2 * torch.randn(len(lens), heads * ratio, size, generator=gen)).to(dtype).to(device)
    return data, query, size**-0.5


@pytest.mark.parametrize("params", CASES)
def test_kernel_matches_reference(params, place, paged, poisoned, close):
    device, dtype = place
    data, query, scale = build(paged, params, device, dtype)
    shape = (*query.shape[:2], max(params[0]) + 9)
    results = []
    for op in (decode_attention, reference.decode_attention):
        out = poisoned(query.shape, dtype, device)
        scores, lse = poisoned(shape, torch.float32, device), poisoned(shape[:2], torch.float32, device)
        op(query, data.kv_cache, data.block_table, data.seq_lens, scale, out, scores, lse)
        results.append((out, scores, lse))
    (out, scores, lse), (want_out, want_scores, want_lse) = results
    close("out", out, want_out, dtype)
    close("lse", lse, want_lse)
    for r, n in enumerate(params[0]):
        close("scores", scores[r, :, :n], want_scores[r, :, :n], dtype)
        assert scores[r, :, n:].isnan().all() and want_scores[r, :, n:].isnan().all()
        if n == 0:
            assert (out[r] == 0).all() and (lse[r] == -torch.inf).all()


@pytest.mark.parametrize("score_dtype", [torch.float32, torch.bfloat16], ids=["fp32 scores", "bf16 scores"])
def test_kernel_scores_without_output(score_dtype, place, paged, poisoned, close):
    """out=None takes another path through the kernel: no values are loaded."""
    device, dtype = place
    lens = [65, 0, 33]
    data, query, scale = build(paged, (lens, 2, 2, 64, 16, "LBNHC"), device, dtype)
    data.kv_cache[..., 64:] = torch.nan  # reading a value would show
    results = []
    for op in (decode_attention, reference.decode_attention):
        scores, lse = poisoned((3, 4, 80), score_dtype, device), poisoned((3, 4), torch.float32, device)
        op(query, data.kv_cache, data.block_table, data.seq_lens, scale, None, scores, lse)
        results.append((scores, lse))
    (scores, lse), (want_scores, want_lse) = results
    close("lse", lse, want_lse)
    for r, n in enumerate(lens):
        kind = ("bf16 scores", None) if score_dtype is torch.bfloat16 else ("scores", dtype)
        close(kind[0], scores[r, :, :n], want_scores[r, :, :n], kind[1])
        assert scores[r, :, n:].isnan().all()


def test_kernel_output_alone(place, paged, poisoned, close):
    """Neither scores nor lse: the combine kernel stores the output only, and strided outputs are honoured."""
    device, dtype = place
    data, query, scale = build(paged, ([130, 20], 2, 2, 64, 16, "LBHNC"), device, dtype)
    wide = poisoned((2, 7, 64), dtype, device)
    want = torch.empty_like(query)
    decode_attention(query, data.kv_cache, data.block_table, data.seq_lens, scale, wide[:, 1:5])
    reference.decode_attention(query, data.kv_cache, data.block_table, data.seq_lens, scale, want)
    close("out", wide[:, 1:5], want, dtype)
    assert wide[:, 0].isnan().all() and wide[:, 5:].isnan().all()


def test_kernel_large_logits(place, paged, poisoned, close):
    """Logits of several hundred overflow exp unless the running maximum is subtracted, in every split."""
    device, dtype = place
    data, query, _ = build(paged, ([300], 1, 2, 64, 16, "LBNHC"), device, dtype)
    results = []
    for op in (decode_attention, reference.decode_attention):
        out, lse = poisoned(query.shape, dtype, device), poisoned((1, 2), torch.float32, device)
        op(query, data.kv_cache, data.block_table, data.seq_lens, 10.0, out, None, lse)
        results.append((out, lse))
    close("out", results[0][0], results[1][0], dtype)
    close("lse", results[0][1], results[1][1])
    assert results[0][1].min() > 89  # exp of that is infinite in fp32


@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC"])
def test_reference_with_blocks_in_order(layout, paged, poisoned, close):
    """The reference reads such blocks in place instead of copying them."""
    cpu = torch.device("cpu")
    lens = [33, 100, 16]
    data = paged(lens, 2, 64, 16, layout, cpu, torch.float32, in_order=True)
    query = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(1))
    out = poisoned(query.shape, torch.float32, cpu)
    reference.decode_attention(query, data.kv_cache, data.block_table, data.seq_lens, 0.125, out)
    for r in range(3):
        k, v = (t[r].repeat_interleave(2, 0) for t in (data.keys, data.values))
        close("out", out[r], F.scaled_dot_product_attention(query[r][:, None], k, v)[:, 0], torch.float32)


@pytest.mark.parametrize("op", [decode_attention, reference.decode_attention], ids=["kernel", "reference"])
def test_blocks_beyond_2_31_elements(op, device, poisoned, close):
    """block * block stride overflows int32 here. The cache is virtual memory but for the two blocks written."""
    cache = torch.empty(2**20 + 8, 1, 16, 128, dtype=torch.float16, device=device)
    blocks = [2**20 + 5, 2]
    assert blocks[0] * cache.stride(0) > 2**31
    tokens = torch.randn(2, 16, 128, generator=torch.Generator().manual_seed(0)).half().to(device)
    for block, content in zip(blocks, tokens, strict=True):
        cache[block, 0] = content
    tokens = tokens.flatten(0, 1)[:20].float()
    query = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(1)).half().to(device)
    table, lens = (torch.tensor(v, dtype=torch.int32, device=device) for v in ([blocks], [20]))
    out = poisoned(query.shape, torch.float16, device)
    op(query, cache, table, lens, 0.125, out)
    weights = (query[0].float() @ tokens[:, :64].T * 0.125).softmax(-1)
    close("out", out[0], weights @ tokens[:, 64:], torch.float16)


@pytest.mark.parametrize("params", CASES)
def test_reference_matches_torch(params, paged, close):
    """The reference against torch on the unpaged tensors: nothing of ours but the page table's construction."""
    data, query, scale = build(paged, params, torch.device("cpu"), torch.float32)
    out = torch.empty_like(query)
    longest = max(max(params[0]), 1)
    scores, lse = torch.empty(*query.shape[:2], longest), torch.empty(query.shape[:2])
    reference.decode_attention(query, data.kv_cache, data.block_table, data.seq_lens, scale, out, scores, lse)
    for r, n in enumerate(params[0]):
        if n == 0:
            assert (out[r] == 0).all() and (lse[r] == -torch.inf).all()
            continue
        q = query[r][:, None]
        want = F.scaled_dot_product_attention(
            q[None], data.keys[r][None], data.values[r][None], scale=scale, enable_gqa=True
        )
        close("out", out[r], want[0, :, 0], torch.float32)
        logits = (q @ data.keys[r].repeat_interleave(params[2], 0).transpose(1, 2))[:, 0] * scale
        close("scores", scores[r, :, :n], logits, torch.float32)
        close("lse", lse[r], logits.logsumexp(-1))


@pytest.mark.parametrize("op", [decode_attention, reference.decode_attention], ids=["kernel", "reference"])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"seq_lens": torch.ones(2, dtype=torch.int64)}, "seq_lens: got torch.int64, wanted torch.int32"),
        ({"out": None}, "out: got None without scores"),
        ({"scores": torch.empty(2, 4, 8)}, "lse: got None, wanted a tensor"),
        ({"block_table": torch.zeros(3, 4, dtype=torch.int32)}, r"block_table: got shape \(3, 4\)"),
        ({"query": torch.empty(2, 3, 64), "out": torch.empty(2, 3, 64)}, "kv_cache: got 2 heads for 3 query heads"),
        ({"kv_cache": torch.empty(4, 2, 256, 16).transpose(2, 3)}, "kv_cache: got .*"),
    ],
    ids=["dtype", "nothing asked", "scores without lse", "row count", "uneven heads", "cache shape"],
)
def test_refuses(op, change, message):
    good = {
        "query": torch.empty(2, 4, 64), "kv_cache": torch.empty(4, 2, 16, 128),
        "block_table": torch.zeros(2, 2, dtype=torch.int32), "seq_lens": torch.ones(2, dtype=torch.int32),
        "scale": 1.0, "out": torch.empty(2, 4, 64),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        op(**{**good, **change})


def test_kernel_refuses_untuned_head_size():
    q = torch.empty(1, 1, 32)
    one = torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="head size 32"):
        decode_attention(q, torch.empty(1, 1, 16, 64), one[None], one, 1.0, torch.empty_like(q))
