"""Caches of 8-bit floats. All that they hold is exact in other dtypes too, so what a kernel makes of such a cache must
be what it makes of the same numbers in the query's dtype."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from specattn_vllm.kernels import reference
from specattn_vllm.kernels.attention.draft_attention import draft_attention
from specattn_vllm.kernels.attention.sparse_attention import sparse_attention
from specattn_vllm.kernels.contracts import FP8
from specattn_vllm.kernels.fp8 import rounded
from specattn_vllm.kernels.guarantee import reference as guarantee
from specattn_vllm.kernels.guarantee.bound import bound_lost
from specattn_vllm.kernels.sketch import reference as sketch
from specattn_vllm.kernels.sketch.encode import encode_keys
from specattn_vllm.sketch.rotation import rotation


@pytest.fixture(autouse=True)
def rounding(monkeypatch):
    """Triton's interpreter rounds 1.95 to 1.0, because nothing is carried from the mantissa to the exponent. PyTorch
    rounds here."""
    original = interpreter._convert_float

    def convert(given, from_type, to_type, mode):
        if to_type != tl.float8e4nv or from_type != tl.float32:
            return original(given, from_type, to_type, mode)
        numbers = torch.from_numpy(given.view("float32").copy())
        return numbers.to(FP8).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


LAYOUTS = pytest.mark.parametrize("layout", ["LBNHC", "LBHNC"])
SIZES = pytest.mark.parametrize("size", [64, 96, 128, 256])


def fits(place, size):
    device, dtype = place
    if device.type == "cuda" and dtype == torch.float32 and size > 128:
        pytest.skip("products of 256 x 256 float32 do not fit in a GPU's shared memory")
    return device, dtype


@pytest.fixture
def equal(close):
    """equal(kind, eight, same): to the bit. On a GPU, products are added up in another order where 8-bit numbers are
    turned into others first."""

    def check(kind, eight, same):
        if eight.device.type == "cpu":
            assert torch.equal(eight, same) and eight.isfinite().all()
        else:
            close(kind, eight, same, None if kind == "lse" else eight.dtype if kind == "out" else torch.bfloat16)

    return check


def both(data, dtype):
    """A cache of 8-bit floats, and one with the same numbers."""
    eight = data.kv_cache.to(FP8)
    assert eight.stride() == data.kv_cache.stride() and eight.float().isnan().any()
    return eight, eight.to(dtype)


def queries(data, heads, size, device, dtype, q_lens):
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(sum(q_lens), heads, size, generator=generator).to(dtype).to(device)
    return query, torch.tensor([0, *q_lens]).cumsum(0).int().to(device)


@LAYOUTS
@SIZES
@pytest.mark.parametrize("op", [sparse_attention, reference.sparse_attention], ids=["kernel", "reference"])
def test_attention_over_a_page_table(op, size, layout, place, paged, equal):
    device, dtype = fits(place, size)
    data = paged([90, 300], 2, size, 16, layout, device, dtype)
    query, starts = queries(data, 6, size, device, dtype, [1, 4])
    block, head, token = data.page_strides
    table = torch.full((2, 2, 300), 2_000_000_000, dtype=torch.int32, device=device)
    kept = torch.tensor([[90, 7], [33, 300]], dtype=torch.int32, device=device)
    for r, h in ((0, 0), (0, 1), (1, 0), (1, 1)):
        p = torch.arange(int(kept[r, h]), device=device)
        table[r, h, : len(p)] = data.block_table[r, p // 16] * block + h * head + p % 16 * token
    found = []
    for cache in both(data, dtype):
        out, lse = torch.zeros_like(query), torch.zeros(query.shape[:2], device=device)
        op(query, cache, table, kept, starts, size**-0.5, out, 4, lse)
        found.append((out, lse))
    equal("out", found[0][0], found[1][0])
    equal("lse", found[0][1], found[1][1])
    assert found[0][0].abs().sum(-1).min() > 0


@LAYOUTS
@SIZES
@pytest.mark.parametrize("op", [draft_attention, reference.draft_attention], ids=["kernel", "reference"])
def test_attention_whose_scores_are_captured(op, size, layout, place, paged, equal):
    device, dtype = fits(place, size)
    data = paged([33, 200], 2, size, 16, layout, device, dtype)
    query, starts = queries(data, 6, size, device, dtype, [1, 3])
    found = []
    for cache in both(data, dtype):
        out, lse = torch.zeros_like(query), torch.zeros(2, 6, device=device)
        scores = torch.zeros(2, 6, 256, device=device)
        rows = torch.tensor([[0], [3]], device=device)
        batch = (query, cache, data.block_table, data.seq_lens, starts, size**-0.5)
        op(*batch, out, rows, scores, lse, 3)
        found.append((out, scores, lse))
    for kind, eight, same in zip(("out", "scores", "lse"), *found, strict=True):
        equal(kind, eight, same)
        assert eight.abs().max() > 0


@LAYOUTS
@pytest.mark.parametrize("op", [bound_lost, guarantee.bound_lost], ids=["kernel", "reference"])
def test_the_bound_on_what_is_lost(op, layout, place, paged, equal):
    device, dtype = place
    data = paged([120, 64], 2, 96, 16, layout, device, dtype)
    query, starts = queries(data, 6, 96, device, dtype, [2, 1])
    positions = torch.arange(32, dtype=torch.int32, device=device).expand(2, 2, 32).contiguous()
    worth = torch.full((2, 2, 32), 1.5, device=device)
    found = []
    for cache in both(data, dtype):
        lost = torch.full((2, 2), torch.nan, device=device)
        lse = torch.full((3, 6), 5.0, device=device)
        op(query, cache, data.block_table, starts, positions, worth, lse, 0.1, 1.6, 2, lost)
        found.append(lost)
    equal("lse", *found)
    assert (found[0] > 0).all() and (found[0] < 1).all()


@pytest.mark.parametrize("size", [64, 96, 256])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.37, 2.6)], ids=str)
def test_what_is_written(scales, size, place):
    """Kernel and reference write the same numbers. Numbers beyond the largest become that, and the code is that of the
    key in the cache."""
    device, dtype = fits(place, size)
    generator = torch.Generator().manual_seed(size)
    key, value = (3 * torch.randn(40, 2, size, generator=generator).to(dtype).to(device) for _ in range(2))
    key[3, 0, 5], key[4, 1, 6], value[5, 0, 7] = 5000.0, -5000.0, 60000.0
    slots = torch.randperm(64, generator=generator)[:40].to(device)
    slots[7] = -1
    turn, centre = rotation(size, dtype, device), torch.randn(2, size, generator=generator).to(device)
    written = []
    for op in (encode_keys, sketch.encode_keys):
        cache = torch.full((4, 2, 16, 2 * size), torch.nan, device=device).to(FP8)
        codes = torch.full((4, 2, 16, size // 4), 0xEE, dtype=torch.uint8, device=device)
        worth = torch.full((4, 2, 16), -3.0, dtype=torch.float16, device=device)
        op(key, slots, turn, centre, codes, worth, value, cache, *scales)
        again, scale_again = codes.clone(), worth.clone()
        live = slots[slots >= 0]
        stored = cache[live // 16, :, live % 16]
        op(stored[..., :size].to(dtype).contiguous(), live, turn, centre, again, scale_again)
        assert torch.equal(codes, again) and torch.equal(worth, scale_again)
        written.append((stored, codes, worth, cache))
    (ours, codes, worth, cache), (theirs, its, its_worth, _) = written
    assert torch.equal(ours.float(), theirs.float())
    mine = [x[slots >= 0] for x in (key, value)]
    assert torch.equal(ours.float(), torch.cat([rounded(x, s) for x, s in zip(mine, scales, strict=True)], -1).float())
    assert ours.float().abs().max() == 448 and cache.float().isnan().any()
    close = ours[..., :size].float() * scales[0] - mine[0].float()
    assert close.abs().median() < 0.1
    assert (codes != its).float().mean() < 1e-3
    torch.testing.assert_close(worth, its_worth, rtol=2e-3, atol=1e-4)


def test_scales_are_for_8_bits_alone(device):
    key, slots = torch.randn(3, 1, 64, device=device), torch.arange(3, device=device)
    turn, centre = rotation(64, torch.float32, device), torch.zeros(1, 64, device=device)
    codes = torch.zeros(1, 1, 16, 16, dtype=torch.uint8, device=device)
    worth, cache = torch.zeros(1, 1, 16, device=device).half(), torch.zeros(1, 1, 16, 128, device=device)
    for op in (encode_keys, sketch.encode_keys):
        with pytest.raises(ValueError, match=r"key_scale: got 0\.5, wanted 1 without fp8"):
            op(key, slots, turn, centre, codes, worth, key, cache, 0.5)
        with pytest.raises(ValueError, match=r"kv_cache: got torch\.float16, wanted torch\.float32 or torch\.float8"):
            op(key, slots, turn, centre, codes, worth, key, cache.half())


def test_nan_stays_nan():
    given = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 1e-9, 17.0])
    assert rounded(given, 1.0).float().tolist()[1:] == [448.0, -448.0, 0.0, 0.0, 16.0]
    assert rounded(given, 1.0).float()[0].isnan()
