"""What a recorder says was kept, against selections that are put into a store by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from specattn_vllm.evaluation.kept import BUCKETS, KeptRecorder
from specattn_vllm.selection.pruner import TableMaps
from specattn_vllm.selection.store import SelectionStore

LENGTH = 3 * BUCKETS  # three tokens a bucket
SLOT = 1
CPU = torch.device("cpu")


def store_of(*kept: list[set[int]], prefix: int) -> SelectionStore:
    """kept[source][group]: positions. Every other slot keeps everything, so that reading a wrong one shows."""
    store = SelectionStore(len(kept), 3, len(kept[0]), LENGTH, CPU)
    store.bits.fill_(-1)
    store.bits[:, SLOT] = 0
    for source, groups in enumerate(kept):
        for group, positions in enumerate(groups):
            words = [sum(1 << p % 32 for p in positions if p // 32 == w) for w in range(store.bits.shape[3])]
            signed = [word - 2**32 if word >= 2**31 else word for word in words]
            store.bits[source, SLOT, group] = torch.tensor(signed, dtype=torch.int32)
    store.prefix_lens[SLOT] = prefix
    return store


def pruner(store, sources: dict[str, int], maps: TableMaps | None = None):
    return SimpleNamespace(store=store, layer_sources=sources, maps=maps)


def test_shares_are_of_each_layer_and_bucket():
    kept = [{0, 1, 2, 3, 31, 32, 99}, {6, 7}]
    store = store_of([kept[0]], [kept[1]], prefix=100)
    recorder = KeptRecorder(pruner(store, {"b": 0, "c": 1}), ["a", "b", "c"], LENGTH)
    recorder.add(SLOT, 100)
    found = recorder.result(4)
    assert (found.document, found.bucket, found.contexts) == (4, 3, [100])
    assert found.shares == {"a": 1.0, "b": 0.07, "c": 0.02}
    assert found.percentages("a") == [[100] * 34]
    # 100 tokens are 33 whole buckets and one of a single token, which is kept.
    assert found.percentages("b") == [[100, 33, *[0] * 8, 67, *[0] * 22, 100]]
    assert found.percentages("c") == [[0, 0, 67, *[0] * 31]]


def test_heads_with_selections_of_their_own_are_averaged():
    store = store_of([{0}, {0, 1, 2}], [set(), {3, 4, 5}], prefix=6)
    # One table: KV heads read groups 1, 1, 0 and 1 of source 0; the other: both of source 1.
    maps = TableMaps.of([(0, (1, 1, 0, 1)), (1, (0, 1, 0, 1))], CPU)
    recorder = KeptRecorder(pruner(store, {"a": 0, "b": 1}, maps), ["a", "b"], LENGTH)
    recorder.add(SLOT, 6)
    found = recorder.result(0)
    assert found.percentages("a") == [[83, 0]]  # (3 * 3 + 1) / 12
    assert found.percentages("b") == [[0, 50]]
    assert found.shares == {"a": 0.4167, "b": 0.25}


def test_a_round_without_a_selection_for_its_length_read_everything():
    store = store_of([{0}], prefix=10)
    recorder = KeptRecorder(pruner(store, {"a": 0}), ["a"], LENGTH)
    recorder.add(SLOT, 10)
    recorder.add(SLOT, 15)
    found = recorder.result(0)
    assert found.contexts == [10, 15]
    assert found.percentages("a") == [[33, 0, 0, 0, 0], [100] * 5]
    assert found.shares["a"] == pytest.approx((0.1 + 1) / 2)


def test_a_document_has_no_more_buckets_than_there_may_be():
    for length in (1, BUCKETS, BUCKETS + 1, 5000):
        recorder = KeptRecorder(pruner(SelectionStore(1, 3, 1, length, CPU), {}), ["a"], length)
        recorder.add(SLOT, length)
        [row] = recorder.result(0).percentages("a")
        assert len(row) <= BUCKETS and set(row) == {100}
