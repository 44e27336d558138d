"""Which requests of a worker found a part of their prompt in the cache, once a KV connector has brought it."""

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
    def __init__(self) -> None:
        self.order: list = []
        self.kv_connector = NO_OP_KV_CONNECTOR

    def initialize_kv_cache(self, is_profiling: bool) -> str:
        self.kv_connector = NO_OP_KV_CONNECTOR if is_profiling else Connector(self.order)
        return "made"


def test_it_acts_after_a_connector_has_loaded():
    runner, step = Runner(), SimpleNamespace(scheduled_new_reqs=[])
    compat.after_loads(runner, lambda *given: runner.order.append(given))
    assert runner.initialize_kv_cache(is_profiling=True) == "made"
    runner.kv_connector.pre_forward(step)
    assert runner.initialize_kv_cache(is_profiling=False) == "made"
    runner.kv_connector.pre_forward(step, attn_metadata={})
    assert runner.order == ["loaded"]
    given = ([[1, 2]], 20), ([[3]], 0), ([[4]], 5)
    step.scheduled_new_reqs = [SimpleNamespace(block_ids=ids, num_computed_tokens=tokens) for ids, tokens in given]
    runner.kv_connector.pre_forward(step)
    assert runner.order[1:] == ["loaded", given[0], given[2]]
    assert "pre_forward" not in vars(NO_OP_KV_CONNECTOR), "shared by all engines of a process"
