"""Ray starts the workers, on two of its nodes, both on this machine."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from specattn_vllm.installed import demo_folder

pytestmark = [
    pytest.mark.engine,
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install ray"),
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two processor cores"),
]

CHOICE = {"specattn": {"method": "sketch", "ratio": 0.2, "min_tokens": 32, "crossover_tokens": 0}}


@pytest.fixture
def two_nodes(monkeypatch):
    """Address of a Ray cluster of two nodes, each with a slot for one worker. All of its processes end with it."""
    # For the server, and for the processes of the cluster: workers inherit theirs.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(Path(__file__).parent)]))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # otherwise a token is written to the home folder
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "num_gpus": 0, "resources": {"slot": 1}, "object_store_memory": 10**8}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    cluster.add_node(**node)
    yield cluster.address
    cluster.shutdown()


def test_workers_of_ray_count_and_give_the_same_tokens(server, two_nodes):
    arguments = ["--speculative-model", str(demo_folder("draft")), "--num-speculative-tokens", "4"]
    arguments += ["--tensor-parallel-size", "2", "--additional-config", json.dumps(CHOICE)]
    executor = ("--distributed-executor-backend", "ray_on_cpus.Executor")
    one = server(*arguments, *executor, RAY_ADDRESS=two_nodes)
    answer = one.complete(900)
    first, second = one.counts()
    assert first.sparse_rows > 4 and 0 < first.kv_read < first.kv_full
    assert (first.rounds, first.kv_full) == (second.rounds, second.kv_full)
    # The nodes share this machine's files, so the counters of both are seen.
    one.metrics_once(
        {
            ("specattn:kv_entries_read_total", "verification", f"{rank}"): counts.kv_read
            for rank, counts in enumerate((first, second))
        }
    )
    one.server.stop()
    other = server(*arguments, "--distributed-executor-backend", "mp", VLLM_CPU_OMP_THREADS_BIND="0|1")
    assert other.complete(900) == answer
    assert other.counts() == [first, second]
