"""The cache as pages of one token: every id reads what it stands for, of one head or of all."""

from __future__ import annotations

import itertools

import pytest
import torch

from specattn_vllm.selection.pages import page_strides, token_pages

ROW = 8


def lbnhc(blocks, heads, tokens):
    """One layer of a token-major cache: not the first, so that its storage does not start at 0."""
    return torch.randn(3, blocks, tokens, heads, ROW)[1].transpose(1, 2)


def lbhnc(blocks, heads, tokens):
    return torch.randn(3, blocks, heads, tokens, ROW)[1]


def blhnc(blocks, heads, tokens):
    """Layers inside a block: another layer's rows lie between two blocks."""
    return torch.randn(blocks, 3, heads, tokens, ROW)[:, 1]


def odd_stride_for_one_head(blocks, heads, tokens):
    """A dimension of size 1 may carry any stride, also one that is no multiple of a row."""
    cache = lbnhc(blocks, heads, tokens)
    block, _, token, last = cache.stride()
    return cache.as_strided(cache.shape, (block, 3, token, last), cache.storage_offset())


VIEWS = [
    pytest.param(lbnhc, (5, 2, 4), (8, 1, 2), id="LBNHC"),
    pytest.param(lbhnc, (5, 2, 4), (8, 4, 1), id="LBHNC"),
    pytest.param(blhnc, (5, 2, 4), (24, 4, 1), id="BLHNC"),
    pytest.param(lbnhc, (5, 1, 4), (4, 0, 1), id="LBNHC, one head"),
    pytest.param(lbhnc, (5, 1, 4), (4, 0, 1), id="LBHNC, one head"),
    pytest.param(odd_stride_for_one_head, (5, 1, 4), (4, 0, 1), id="one head with a stride of its own"),
    pytest.param(lbnhc, (1, 2, 4), (0, 1, 2), id="LBNHC, one block"),
    pytest.param(lbhnc, (5, 2, 1), (2, 1, 0), id="LBHNC, one token"),
    pytest.param(lbnhc, (1, 1, 1), (0, 0, 0), id="one page"),
]


@pytest.mark.parametrize(("view", "shape", "strides"), VIEWS)
def test_strides_are_counted_in_rows(view, shape, strides):
    assert page_strides(view(*shape)) == strides


def test_more_rows_than_ids_can_name_are_refused():
    for blocks in (2**27, 2**27 + 1):
        cache = torch.empty((blocks, 2, 8, ROW), dtype=torch.float16, device="meta")
        if blocks * 16 <= 2**31:
            assert page_strides(cache) == (16, 8, 1)
        else:
            with pytest.raises(
                ValueError, match=r"2,147,483,664 rows .*: lower --gpu-memory-utilization or set --num-gp"
            ):
                page_strides(cache)


@pytest.mark.parametrize(("view", "shape", "strides"), VIEWS)
def test_every_id_addresses_its_key_and_value(view, shape, strides):
    cache = view(*shape)
    assert cache.shape == (*shape, ROW)
    assert cache.storage_offset() > 0
    pages = token_pages(cache, 1)
    block, head, token = page_strides(cache)
    highest = 0
    for b, h, n in itertools.product(*map(range, shape)):
        page = b * block + h * head + n * token
        assert torch.equal(pages[page, 0, 0], cache[b, h, n])
        highest = max(highest, page)
    # Not a row more, which in another layer's cache could lie past the end of the storage.
    assert pages.shape == (highest + 1, 1, 1, ROW)


@pytest.mark.parametrize(("view", "shape", "strides"), VIEWS)
def test_every_id_of_the_first_head_addresses_all_heads_of_its_token(view, shape, strides):
    cache = view(*shape)
    pages = token_pages(cache, shape[1])
    block, _, token = page_strides(cache)
    highest = 0
    for b, n in itertools.product(range(shape[0]), range(shape[2])):
        page = b * block + n * token
        assert torch.equal(pages[page, 0], cache[b, :, n])
        highest = max(highest, page)
    assert pages.shape == (highest + 1, 1, shape[1], ROW)


@pytest.mark.parametrize(("view", "shape", "strides"), VIEWS)
@pytest.mark.parametrize("all_heads", [False, True])
def test_no_page_lies_outside_the_layer(view, shape, strides, all_heads):
    cache = view(*shape)
    pages = token_pages(cache, shape[1] if all_heads else 1)

    def last(tensor):
        return tensor.storage_offset() + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))

    assert pages.storage_offset() == cache.storage_offset()
    assert last(pages) == last(cache.as_strided(shape, [s * ROW for s in strides])) + ROW - 1


@pytest.mark.parametrize(("view", "shape", "strides"), VIEWS)
@pytest.mark.parametrize("all_heads", [False, True])
def test_no_stride_is_zero(view, shape, strides, all_heads):
    """Hopper's tensor memory accelerator refuses those, also of a dimension of size 1."""
    pages = token_pages(view(*shape), shape[1] if all_heads else 1)
    assert all(pages.stride())
    # A page is one row of memory away from the next, and a token's heads are as far from each other as in the cache.
    assert pages.stride()[0] == ROW and pages.stride()[3] == 1
    if all_heads and shape[1] > 1:
        assert pages.stride()[2] == strides[1] * ROW


@pytest.mark.parametrize("view", [lbnhc, lbhnc])
@pytest.mark.parametrize("heads", [1, 3])
def test_pages_are_a_view(view, heads):
    cache = view(2, 3, 2)
    pages = token_pages(cache, heads)
    cache[1, 0, 1] = 7.0
    block, _, token = page_strides(cache)
    assert (pages[block + token, 0, 0] == 7.0).all()
    assert pages.data_ptr() == cache.data_ptr()


@pytest.mark.parametrize("heads", [0, 2, 4])
def test_some_of_the_heads_are_no_page(heads):
    with pytest.raises(ValueError, match=f"heads: got {heads}, wanted 1 or the cache's 3"):
        token_pages(lbnhc(2, 3, 2), heads)


@pytest.mark.parametrize(
    "cache",
    [
        pytest.param(torch.randn(3, 2, 4, ROW + 4)[..., :ROW], id="padded rows"),
        pytest.param(torch.randn(3, 2, 2 * ROW, 4).transpose(2, 3)[..., :ROW], id="elements outside tokens"),
        pytest.param(torch.randn(3, 2, 4, 2 * ROW)[..., ::2], id="every other element"),
        pytest.param(torch.randn(3, 2, 4 * ROW + 4)[..., : 4 * ROW].unflatten(2, (4, ROW)), id="padded heads"),
    ],
)
@pytest.mark.parametrize("function", [page_strides, lambda cache: token_pages(cache, 1)], ids=["strides", "pages"])
def test_a_layout_that_is_not_rows_is_refused_with_the_layouts_that_are(cache, function):
    with pytest.raises(ValueError) as caught:
        function(cache)
    message = str(caught.value)
    assert f"strides {tuple(cache.stride())} for shape {tuple(cache.shape)}" in message
    assert f"rows of {ROW}" in message
    assert "LBNHC or LBHNC layout (VLLM_KV_CACHE_LAYOUT)" in message
