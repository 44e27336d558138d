"""The pruner: tables of whole blocks, and of selections per head."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from specattn_vllm import executors
from specattn_vllm.kernels import reference
from specattn_vllm.selection.pages import page_strides
from specattn_vllm.selection.pruner import Pruner, TableMaps
from specattn_vllm.selection.store import SelectionStore

CPU = torch.device("cpu")
HEADS, BLOCK, MAX_LEN, SLOTS = 2, 4, 30, 6
NUM_LAYERS, SOURCES = 5, 2
STALE = 1_000_000  # following it is an index error


# Selections of whole blocks


def test_tables_of_blocks_name_every_block_with_a_kept_token(row, new_setup):
    """For executors that read whole blocks; what they read besides is counted as read."""
    setup = new_setup("LBNHC")
    setup.pruner.operations = dataclasses.replace(
        setup.pruner.operations, build_page_tables=reference.build_block_tables, granularity="block"
    )
    setup.select(4, 17, {1, 2, 13}, {16})
    tables = torch.full((2, 8), STALE, dtype=torch.int32)
    tables[0, :5], tables[1, :2] = torch.tensor([9, 7, 5, 3, 1]), torch.tensor([2, 4])
    plan = setup.step([row(4, 17, query=2), row(1, 5, query=1)], tables)
    # Row 0 has 19 tokens, 3 of them in its last block, where the new ones are; row 1 reads its 6 tokens.
    assert plan.kept[..., 0].tolist() == [[4 + 4 + 3, 6], [3, 6]]
    assert plan.page_table[0, 0, 0, :3].tolist() == [9, 3, 1]
    assert plan.page_table[1, 0, 0, :1].tolist() == [1]
    assert plan.page_table[0, 1, 0, :2].tolist() == plan.page_table[1, 1, 0, :2].tolist() == [2, 4]
    counts = setup.counters.read()
    assert counts.kv_read == (2 * (11 + 6) + (3 + 6) + 2 * (19 + 6)) * HEADS
    assert counts.kv_full == 5 * (19 + 6) * HEADS


# Selections per head


@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC"])
def test_a_selection_per_head_gets_a_table_per_head(layout, row, new_setup):
    setup = new_setup(layout, groups=HEADS)
    setup.select(4, 9, {0, 3, 8}, {1}, set(), {5, 6})
    plan, tokens = setup.prune(row(4, 9, query=1), row(3, 5, query=2))
    assert plan.kept.tolist() == [[[4, 2], [7, 7]], [[1, 3], [7, 7]]]
    assert [tokens[s, 0, h] for s in range(2) for h in range(2)] == [[0, 3, 8, 9], [1, 9], [9], [5, 6, 9]]
    assert all(tokens[s, 1, h] == [*range(7)] for s in range(2) for h in range(2))
    counts = setup.counters.read()
    assert counts.kv_full == (10 + 7) * HEADS * NUM_LAYERS
    # Source 0 serves two layers; two more read everything.
    assert counts.kv_read == 2 * (4 + 2 + 14) + (1 + 3 + 14) + 2 * (10 + 7) * HEADS


@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC"])
def test_tables_through_maps_are_each_layer_s_own(layout, row, new_setup):
    """Three tables of two sources, whose bits have three groups, for two heads."""
    setup, groups = new_setup(layout, groups=HEADS), 3
    setup.store = SelectionStore(SOURCES, SLOTS, groups, MAX_LEN, CPU)
    tables = torch.full((5, SLOTS, HEADS, MAX_LEN + 5), -(2**30), dtype=torch.int32)
    layers = {"model.layers.1": 0, "model.layers.2": 1, "model.layers.4": 2}
    setup.pruner = Pruner(
        setup.store,
        executors.resolve("torch", CPU),
        setup.counters,
        layer_sources=layers,
        num_layers=NUM_LAYERS,
        num_kv_heads=HEADS,
        max_query_len=5,
        page_table=tables,
        maps=TableMaps.of([(0, (2, 0)), (1, (1, 1)), (0, (0, 1))]),
    )
    setup.pruner.attach(BLOCK, lambda: page_strides(setup.cache))
    words = torch.tensor([[0b1, 0b110, 0b1000], [0b10000, 0b100000, 0b11]], dtype=torch.int32)
    setup.store.put(torch.tensor([4]), words.view(SOURCES, 1, groups, 1), torch.tensor([9], dtype=torch.int32))
    block_table = torch.tensor([[7, 3, 11], [8, 5, STALE]], dtype=torch.int32)
    plan = setup.step([row(4, 9, query=1), row(1, 5, query=2)], block_table)
    assert plan.layer_sources == layers
    kept = [[[3], [0]], [[5], [5]], [[0], [1, 2]]]
    assert plan.kept.tolist() == [[[len(head) + 1 for head in table], [7, 7]] for table in kept]
    block, head_stride, token = page_strides(setup.cache)
    for t, h in itertools.product(range(3), range(HEADS)):
        for r, positions in enumerate(([*kept[t][h], 9], range(7))):
            pages = [int(block_table[r, p // BLOCK]) * block + h * head_stride + p % BLOCK * token for p in positions]
            assert plan.page_table[t, r, h, : len(pages)].tolist() == pages
    assert (tables[3:] == -(2**30)).all()
    counts = setup.counters.read()
    assert counts.kv_full == (10 + 7) * HEADS * NUM_LAYERS
    assert counts.kv_read == int(plan.kept.sum()) + 2 * (10 + 7) * HEADS
