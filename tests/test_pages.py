"""The cache as single-token, single-head pages: every id reads the row it stands for."""

from __future__ import annotations

import pytest
import torch

from specattn_vllm.selection.pages import folded_pages, page_strides

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


@pytest.mark.parametrize(("view", "shape", "strides"), VIEWS)
def test_every_id_addresses_its_key_and_value(view, shape, strides):
    cache = view(*shape)
    assert cache.shape == (*shape, ROW)
    assert cache.storage_offset() > 0
    pages = folded_pages(cache)
    block, head, token = page_strides(cache)
    highest = 0
    for b in range(shape[0]):
        for h in range(shape[1]):
            for n in range(shape[2]):
                page = b * block + h * head + n * token
                assert torch.equal(pages[page], cache[b, h, n])
                highest = max(highest, page)
    # Not a row more, which in another layer's cache could lie past the end of the storage.
    assert pages.shape == (highest + 1, ROW)


@pytest.mark.parametrize("view", [lbnhc, lbhnc])
def test_pages_are_a_view(view):
    cache = view(2, 2, 2)
    pages = folded_pages(cache)
    cache[1, 0, 1] = 7.0
    block, _, token = page_strides(cache)
    assert (pages[block + token] == 7.0).all()
    assert pages.data_ptr() == cache.data_ptr()


@pytest.mark.parametrize(
    "cache",
    [
        pytest.param(torch.randn(3, 2, 4, ROW + 4)[..., :ROW], id="padded rows"),
        pytest.param(torch.randn(3, 2, 2 * ROW, 4).transpose(2, 3)[..., :ROW], id="elements outside tokens"),
        pytest.param(torch.randn(3, 2, 4, 2 * ROW)[..., ::2], id="every other element"),
        pytest.param(torch.randn(3, 2, 4 * ROW + 4)[..., : 4 * ROW].unflatten(2, (4, ROW)), id="padded heads"),
    ],
)
@pytest.mark.parametrize("function", [page_strides, folded_pages])
def test_a_layout_that_is_not_rows_is_refused_with_the_layouts_that_are(cache, function):
    with pytest.raises(ValueError) as caught:
        function(cache)
    message = str(caught.value)
    assert f"strides {tuple(cache.stride())} for shape {tuple(cache.shape)}" in message
    assert f"rows of {ROW}" in message
    assert "LBNHC or LBHNC layout (VLLM_KV_CACHE_LAYOUT)" in message
