"""Codes: what they stand for, where they lie, and that kernel and reference write the same."""

from __future__ import annotations

import itertools

import pytest
import torch

from specattn_vllm.kernels.sketch import reference
from specattn_vllm.kernels.sketch.encode import encode_keys
from specattn_vllm.kernels.sketch.layout import SketchLayout, sketch_views
from specattn_vllm.sketch.rotation import rotation


def _written(op, key, slots, turn, centre, shape, bits):
    blocks, heads, tokens, size = shape
    codes = torch.full((blocks, heads, tokens, size * bits // 8), 0xEE, dtype=torch.uint8, device=key.device)
    scales = torch.full((blocks, heads, tokens), -3.0, dtype=torch.float16, device=key.device)
    op(key, slots, turn, centre, codes, scales)
    return codes, scales


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize(
    ("heads", "size", "tokens"), [(1, 64, 1), (3, 64, 37), (2, 128, 50), (1, 256, 5), (2, 96, 20), (1, 192, 5)]
)
def test_the_kernel_writes_what_the_reference_does(place, heads, size, tokens, bits):
    device, dtype = place
    if device.type == "cuda" and dtype == torch.float32 and size >= 192:
        pytest.skip("products of 256 x 256 float32 do not fit in a GPU's shared memory")
    generator = torch.Generator().manual_seed(tokens)
    key = (torch.randn(tokens + 2, heads, size, generator=generator) + 2).to(dtype).to(device)
    key[tokens:] = torch.nan  # padding of a graph's batch: no slot
    slots = torch.randperm(8 * 16, generator=generator)[:tokens]
    slots[tokens // 2] = -1
    centre = torch.randn(heads, size, generator=generator).to(device)
    arguments = (key, slots.to(device), rotation(size, dtype, device), centre, (8, heads, 16, size), bits)
    got, want = _written(encode_keys, *arguments), _written(reference.encode_keys, *arguments)
    # An element on the border between two levels may round either way.
    assert (got[0] != want[0]).float().mean() < 1e-3
    torch.testing.assert_close(got[1].float(), want[1].float(), rtol=2e-3, atol=1e-4)
    untouched = torch.ones(8 * 16, dtype=torch.bool)
    untouched[slots[slots >= 0]] = False
    assert (got[0].transpose(1, 2).reshape(8 * 16, -1)[untouched] == 0xEE).all()
    assert (got[1].transpose(1, 2).reshape(8 * 16, -1)[untouched] == -3).all()


@pytest.mark.parametrize(("bits", "error"), [(1, 0.75), (2, 0.4), (4, 0.12)])
def test_codes_stand_for_the_rotated_key_less_its_centre(bits, error):
    """Read back by the layout's own words, not by the code under test."""
    size, heads = 64, 2
    key, centre = torch.randn(100, heads, size), 0.5 * torch.randn(heads, size)
    turn = rotation(size, torch.float32, torch.device("cpu"))
    codes, scales = _written(reference.encode_keys, key, torch.arange(100), turn, centre, (7, heads, 16, size), bits)
    want = key @ turn / 8 - centre
    errors = []
    for t, h in itertools.product(range(100), range(heads)):
        block, offset = divmod(t, 16)
        levels = []
        for element in range(size):
            field, j = divmod(element, size * bits // 8)
            code = (int(codes[block, h, offset, j]) >> (field * bits)) & ((1 << bits) - 1)
            levels.append(2 * code - ((1 << bits) - 1))
        estimate = torch.tensor(levels) * float(scales[block, h, offset])
        assert torch.dot(estimate, want[t, h]) == pytest.approx(float(want[t, h].square().sum()), rel=2e-3)
        errors.append(float((estimate - want[t, h]).norm() / want[t, h].norm()))
    # One key with one outlier can be far off: the bound is the mean's.
    assert sum(errors) / len(errors) < 1.1 * error


def test_a_code_does_not_depend_on_what_is_written_beside_it(place):
    device, dtype = place
    key = torch.randn(33, 2, 64).to(dtype).to(device)
    turn, centre = rotation(64, dtype, device), torch.zeros(2, 64, device=device)
    slots = torch.arange(33, device=device)
    together = _written(encode_keys, key, slots, turn, centre, (3, 2, 16, 64), 2)
    codes, scales = torch.zeros_like(together[0]), torch.zeros_like(together[1])
    for part in (slice(20, 33), slice(0, 7), slice(7, 20)):
        encode_keys(key[part], slots[part], turn, centre, codes, scales)
    flat = codes.transpose(1, 2).reshape(48, -1)[:33], scales.transpose(1, 2).reshape(48, -1)[:33]
    assert torch.equal(flat[0], together[0].transpose(1, 2).reshape(48, -1)[:33])
    assert torch.equal(flat[1], together[1].transpose(1, 2).reshape(48, -1)[:33])


def test_keys_of_zeros_and_of_nan_write_codes_and_a_scale_that_says_so(place):
    device, dtype = place
    key = torch.zeros(2, 1, 64, dtype=dtype, device=device)
    key[1] = torch.nan
    for op in (encode_keys, reference.encode_keys):
        _, scales = _written(
            op, key, torch.arange(2, device=device), rotation(64, dtype, device), torch.zeros(1, 64, device=device),
            (1, 1, 16, 64), 2,
        )  # fmt: skip
        assert scales[0, 0, 0] == 0
        assert scales[0, 0, 1].isnan()


@pytest.mark.parametrize("layout", ["tokens", "heads"])
@pytest.mark.parametrize(("heads", "size", "tokens"), [(1, 64, 1), (3, 64, 37), (2, 128, 50)])
def test_with_values_the_cache_is_written_as_well(place, heads, size, tokens, layout):
    """Codes stay what they are without; keys and values come from a wider tensor, as a model's projection gives them,
    and lie in the cache in either of vLLM's orders."""
    device, dtype = place
    both = torch.randn(tokens + 2, 2, heads, size).to(dtype).to(device)
    both[tokens:] = torch.nan
    key, value = both[:, 0], both[:, 1]
    slots = torch.randperm(8 * 16)[:tokens]
    slots[tokens // 2] = -1
    slots = slots.to(device)
    order = (8, 16, heads, 2 * size) if layout == "tokens" else (8, heads, 16, 2 * size)
    turn, centre = rotation(size, dtype, device), torch.zeros(heads, size, device=device)
    alone = _written(encode_keys, key, slots, turn, centre, (8, heads, 16, size), 2)
    for op in (encode_keys, reference.encode_keys):
        cache = torch.full(order, 7.0, dtype=dtype, device=device)
        entries = cache.transpose(1, 2) if layout == "tokens" else cache
        codes, scales = torch.full_like(alone[0], 0xEE), torch.full_like(alone[1], -3.0)
        op(key, slots, turn, centre, codes, scales, value, entries)
        if op is encode_keys:
            assert torch.equal(codes, alone[0])
            assert torch.equal(scales, alone[1])
        flat, live = entries.transpose(1, 2).reshape(8 * 16, heads, 2 * size), slots >= 0
        assert torch.equal(flat[slots[live]], both[:tokens][live].transpose(1, 2).flatten(2))
        untouched = torch.ones(8 * 16, dtype=torch.bool, device=device)
        untouched[slots[live]] = False
        assert (flat[untouched] == 7).all()


def test_values_without_a_cache_are_refused():
    key, centre = torch.randn(4, 2, 64), torch.zeros(2, 64)
    codes, scales = torch.zeros(1, 2, 16, 16, dtype=torch.uint8), torch.zeros(1, 2, 16, dtype=torch.float16)
    turn = rotation(64, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="kv_cache"):
        reference.encode_keys(key, torch.arange(4), turn, centre, codes, scales, value=key)


def test_no_keys_launch_nothing(place):
    device, dtype = place
    empty = torch.zeros(0, 1, 64, dtype=dtype, device=device)
    codes, _ = _written(
        encode_keys, empty, torch.zeros(0, dtype=torch.int64, device=device), rotation(64, dtype, device),
        torch.zeros(1, 64, device=device), (1, 1, 16, 64), 2,
    )  # fmt: skip
    assert (codes == 0xEE).all()


@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC"])
def test_the_sketch_lies_behind_the_keys_and_values_of_its_block(layout):
    heads, tokens, size, bits, blocks = 3, 16, 64, 2, 4
    sizes = SketchLayout(heads, tokens, size, bits, 2)
    assert (sizes.token_bytes, sizes.kv_bytes, sizes.page_bytes) == (18, 256, 12288)
    assert sizes.tail_bytes == 1024  # 864, rounded up to whole keys and values
    page = (sizes.page_bytes + sizes.tail_bytes) // 2
    raw = torch.zeros(2 * page + blocks * page, dtype=torch.float16)
    inner = (2 * size, heads * 2 * size) if layout == "LBNHC" else (tokens * 2 * size, 2 * size)
    cache = raw.as_strided((blocks, heads, tokens, 2 * size), (page, *inner, 1), 2 * page)
    codes, scales = sketch_views(cache, bits)
    codes.fill_(1)
    scales.fill_(1.0)
    assert not cache.any()
    tail = raw.view(-1, page)[2:, sizes.page_bytes // 2 :]
    assert int((tail.contiguous().view(torch.uint8) != 0).sum()) >= blocks * heads * tokens * sizes.code_bytes
    assert not raw[: 2 * page].any()


def test_a_cache_without_room_is_refused():
    cache = torch.zeros(4, 2, 16, 128)
    with pytest.raises(ValueError, match="wanted 16384 for keys and values and"):
        sketch_views(cache, 2)
