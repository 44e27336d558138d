"""Inputs of `specattn bench kernels`: selections, page tables."""

from __future__ import annotations

import pytest
import torch

from specattn_vllm.bench.kernels.inputs import VERIFY_LEN
from specattn_vllm.kernels.sketch.layout import sketch_views


@pytest.mark.parametrize(("share", "kept"), [(0.1, 100), (0.25, 250), (0.001, 7)])
def test_a_selection_has_the_share_asked_for(setup, share, kept):
    it = setup("3x1000", share)
    assert it.kept_tokens(0.5) == kept
    positions = it.positions(4, kept)
    assert positions.shape == (3, 4, kept) and (positions.diff(dim=-1) > 0).all() and int(positions.min()) >= 0
    new = torch.arange(1000 - VERIFY_LEN, 1000, device=it.device)
    assert (positions[..., -VERIFY_LEN:] == new).all(), "new tokens are the last entries"


@pytest.mark.parametrize("groups", [1, 2])
def test_page_ids_lead_to_the_chosen_tokens(setup, groups):
    it = setup("2x50")
    cache, req = it.layers(it.target)[0], it.requests(it.target, 1)
    positions = it.positions(groups, 12)
    table = it.page_table(positions, req.block_table, cache)
    assert table.shape == (2, groups, 50) and table.dtype == torch.int32
    pages = cache.transpose(1, 2).reshape(-1, 2 * it.target.size)  # tokens lie outermost
    for r in range(2):
        for head in range(2):
            group = min(head, groups - 1)
            ids, p = table[r, group, :12] + (head if groups == 1 else 0), positions[r, group]
            assert torch.equal(pages[ids.long()], cache[req.block_table[r, p // 16].long(), head, p % 16])


def test_layers_have_room_behind_their_blocks(setup):
    it = setup("2x40")
    layer, other = it.make_layers(it.target, tail=5 * 64)[:2]
    assert layer.shape == (6, 2, 16, 128) and layer.data_ptr() != other.data_ptr()
    codes, scales = sketch_views(layer, 2)
    before = layer.clone()
    codes.fill_(255)
    scales.fill_(7)
    assert torch.equal(layer, before)


def test_one_thing_is_kept_at_a_time(setup):
    it = setup()
    first = it.layers(it.target)
    assert it.layers(it.target) is first
    it.once("other", list)
    assert it.layers(it.target) is not first
