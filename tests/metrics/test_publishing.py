"""Where metrics meet vLLM: the registries of its servers, and the steps of a worker."""

from __future__ import annotations

import json
import logging
import os
from types import SimpleNamespace

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from vllm.v1.metrics import prometheus

from specattn_vllm import compat
from specattn_vllm.metrics import publish, snapshot
from specattn_vllm.metrics.snapshot import Audited
from specattn_vllm.reporter import Reporter
from specattn_vllm.stats import Counters, Counts

# The registries of vLLM


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(snapshot.FOLDER, str(tmp_path))
    return tmp_path


def scraped(registry) -> str:
    return generate_latest(registry).decode()


@pytest.mark.parametrize("several", [False, True], ids=["one server", "several servers"])
def test_the_registry_behind_metrics_has_ours_once(several, folder, monkeypatch, tmp_path_factory, made):
    compat.serve_metrics()
    compat.serve_metrics()
    monkeypatch.setattr(prometheus, "REGISTRY", CollectorRegistry())
    monkeypatch.setattr(MultiProcessCollector, "collect", MultiProcessCollector.collect)  # as it was, afterwards
    if several:
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path_factory.mktemp("theirs")))
    else:
        monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    registry = prometheus.get_prometheus_registry()
    if not several:
        assert prometheus.get_prometheus_registry() is registry
    assert scraped(registry) == ""
    made().write(folder)
    if several:
        # What answers makes a registry of its own.
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        prometheus.get_prometheus_registry()
    assert scraped(registry).count("# HELP specattn:rounds_total") == 1


def test_processes_that_ray_starts_are_told_the_folder(monkeypatch):
    from vllm.ray.ray_env import get_env_vars_to_copy

    for name in (snapshot.FOLDER, snapshot.FOR_RAY):
        monkeypatch.setenv(name, "")  # so that both are as before afterwards
    snapshot.make_folder()
    assert snapshot.FOLDER in get_env_vars_to_copy()


def test_without_our_backend_the_registry_is_as_it_was(monkeypatch):
    monkeypatch.delenv(snapshot.FOLDER, raising=False)
    registry = CollectorRegistry()
    monkeypatch.setattr(prometheus, "REGISTRY", registry)
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    compat.serve_metrics()
    assert prometheus.get_prometheus_registry() is registry
    assert not list(registry.collect())


def test_a_server_that_has_the_function_by_name_gets_ours():
    from vllm.entrypoints.serve.instrumentator import metrics as server

    compat.serve_metrics()
    assert server.get_prometheus_registry is prometheus.get_prometheus_registry


# A worker


def step(tokens: int, *requests: str) -> SimpleNamespace:
    new = [SimpleNamespace(req_id=name) for name in requests]
    return SimpleNamespace(scheduled_new_reqs=new, total_num_scheduled_tokens=tokens)


@pytest.fixture
def worker(folder, monkeypatch, made):
    """A model runner as `publish.start` leaves it, and its reporter."""
    monkeypatch.setattr(publish, "blank", lambda runner, options: made(counts=Counts()))
    counters = Counters(torch.device("cpu"))
    runner = SimpleNamespace(
        speculator=SimpleNamespace(reporter=Reporter(counters, 60)), steps=[], finish_requests=lambda step: None
    )
    runner.reporter, runner.counters = runner.speculator.reporter, counters
    publish.start(runner, None)
    return runner


def test_a_worker_is_seen_before_it_counts_and_counts_from_the_first_request_on(worker, folder, monkeypatch):
    monkeypatch.setattr("specattn_vllm.reporter.PUBLISH_S", 0.0)
    assert [one.counts for one in snapshot.read_all(folder)] == [Counts()]
    worker.finish_requests(step(5, "_warmup_0_"))
    worker.counters.add(rounds=9)
    worker.reporter.tick()
    worker.finish_requests(step(0))
    assert [one.counts for one in snapshot.read_all(folder)] == [Counts()]
    worker.finish_requests(step(5, "cmpl-1"))
    worker.reporter.tick()
    assert [one.counts for one in snapshot.read_all(folder)] == [Counts(rounds=9)]


def test_a_step_without_tokens_is_an_idle_engine(worker, monkeypatch):
    idle = []
    monkeypatch.setattr(worker.reporter, "idle", lambda: idle.append(1))
    worker.finish_requests(step(5, "cmpl-1"))
    worker.finish_requests(step(5))
    assert not idle
    worker.finish_requests(step(0))
    assert idle


def test_what_cannot_be_written_is_said_once_and_stops_nothing(tmp_path, caplog, made):
    publisher = publish.Publisher(tmp_path / "gone", made())
    was, publish.logger.propagate = publish.logger.propagate, False
    publish.logger.addHandler(caplog.handler)
    caplog.set_level(logging.WARNING, logger=publish.logger.name)
    try:
        for _ in range(3):
            publisher.write(Counts(rounds=1), [])
    finally:
        publish.logger.propagate = was
        publish.logger.removeHandler(caplog.handler)
    [record] = caplog.records
    assert "metrics cannot be published" in record.getMessage()


def test_snapshots_are_small(tmp_path, made):
    made(audited=Audited([(e / 64, 10**9) for e in publish.EDGES], 1e9)).write(tmp_path)
    [path] = tmp_path.iterdir()
    assert path.stat().st_size < 4096 and json.loads(path.read_text())["rank"] == 0


def test_links_and_pipes_in_the_folder_are_neither_followed_nor_waited_for(tmp_path, made):
    """Whoever may write there can falsify metrics, and nothing else."""
    folder, mine = tmp_path / "metrics", tmp_path / "mine"
    folder.mkdir()
    mine.write_text("mine")
    part = folder / f"0-0-{os.getpid()}.part"
    part.symlink_to(mine)
    with pytest.raises(OSError):
        made().write(folder)
    assert mine.read_text() == "mine"
    part.unlink()
    os.mkfifo(part)
    with pytest.raises(OSError):
        made().write(folder)
    part.unlink()
    made().write(folder)
    os.mkfifo(folder / "0-1-1.json")  # whose reader would wait for ever
    with (folder / "0-2-2.json").open("wb") as file:
        file.truncate(2**34)  # takes no room on the disk
    assert [found.rank for found in snapshot.read_all(folder)] == [0]
