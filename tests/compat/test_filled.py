"""Which requests of a worker found blocks that vLLM may have filled without running the model."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
from vllm.v1.worker.gpu.kv_connector import NO_OP_KV_CONNECTOR

from specattn_vllm import compat


class Connector:
    """Stands for vLLM's `ActiveKVConnector`."""

    def __init__(self, order: list) -> None:
        self.kv_connector = self
        self.order = order

    def pre_forward(self, scheduler_output, input_batch=None, attn_metadata=None) -> None:
        self.order.append("loaded")


class Runner:
    def __init__(self, connects: bool, is_hybrid: bool = False) -> None:
        self.order: list = []
        self.kv_connector = NO_OP_KV_CONNECTOR
        self.kv_cache_config = SimpleNamespace(kv_cache_groups=["one", "another"])
        self.vllm_config = SimpleNamespace(kv_transfer_config={} if connects else None)
        self.model_config = SimpleNamespace(is_hybrid=is_hybrid)

    def initialize_kv_cache(self, is_profiling: bool) -> str:
        self.kv_connector = NO_OP_KV_CONNECTOR if is_profiling else Connector(self.order)
        return "made"

    def update_requests(self, scheduler_output) -> None:
        self.order.append("copied")


GIVEN = ([[1, 2], [3]], 20), ([[3], [4]], 0), ([[4], [5]], 5)


def step(*given, copies=None) -> SimpleNamespace:
    requests = [SimpleNamespace(block_ids=ids, num_computed_tokens=tokens) for ids, tokens in given]
    return SimpleNamespace(scheduled_new_reqs=requests, kv_cache_block_copies=copies)


def test_it_acts_after_a_connector_has_loaded():
    runner = Runner(connects=True)
    compat.after_filled(runner, lambda *given: runner.order.append(given))
    assert runner.initialize_kv_cache(is_profiling=True) == "made"
    runner.kv_connector.pre_forward(step(*GIVEN))
    assert runner.order == []
    assert runner.initialize_kv_cache(is_profiling=False) == "made"
    assert runner.order == [([[0], [0]], 1)], "a block of nobody's, to compile"
    runner.kv_connector.pre_forward(step(), attn_metadata={})
    runner.kv_connector.pre_forward(step(*GIVEN))
    assert runner.order[1:] == ["loaded", "loaded", GIVEN[0], GIVEN[2]]
    assert "pre_forward" not in vars(NO_OP_KV_CONNECTOR), "shared by all engines of a process"


def test_it_acts_after_vllm_has_copied_blocks():
    runner = Runner(connects=False, is_hybrid=True)
    compat.after_filled(runner, lambda *given: runner.order.append(given))
    runner.update_requests(step(*GIVEN))
    runner.update_requests(step(*GIVEN, copies=[(7, 6)]))
    assert runner.order == ["copied", "copied", GIVEN[0], GIVEN[2]]


def test_other_workers_are_left_alone():
    runner = Runner(connects=False)
    compat.after_filled(runner, lambda *given: None)
    assert not {"update_requests", "initialize_kv_cache"} & set(vars(runner))
