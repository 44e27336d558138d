"""The snapshot of a worker, and a server whose numbers are read."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from specattn_vllm.installed import demo_folder
from specattn_vllm.methods import METHODS
from specattn_vllm.metrics.families import INFO
from specattn_vllm.metrics.snapshot import Cache, Snapshot
from specattn_vllm.stats import Counts

COUNTS = Counts(*(1000 * (i + 1) for i in range(len(fields(Counts)))))
CACHES = {"verification": Cache(512, 34), "drafting": Cache(256)}


def snapshot_of(**given) -> Snapshot:
    info = {label: f"a {label}" for label in INFO}
    return Snapshot(
        **{
            "engine": 0,
            "rank": 0,
            "pid": os.getpid(),
            "info": info,
            "dense_reasons": METHODS["sketch"].dense_reasons,
            "drafts": True,
            "caches": CACHES,
            "counts": COUNTS,
            **given,
        }
    )


@pytest.fixture
def made():
    """made(**fields) -> a worker's snapshot, with other counts and labels than any default."""
    return snapshot_of


class Served:
    """A server of the demo pair, and what an operator and a client ask of it."""

    def __init__(self, server_class, folder: Path, *arguments: str, **environment: str) -> None:
        # Not in pytest's folder: a Unix socket's path has at most 107 characters, of which vLLM needs 37.
        self.temporary = Path(tempfile.mkdtemp(prefix="served-"))

        def command(port: int) -> list[str]:
            return [
                sys.executable,
                "-P",
                "-m",
                "vllm.entrypoints.cli.main",
                "serve",
                str(demo_folder("target")),
                "--attention-backend",
                "specattn",
                "--served-model-name",
                "demo",
                "--max-model-len",
                "2048",
                "--dtype",
                "float32",
                "--enforce-eager",
                "--max-num-seqs",
                "4",
                "--max-num-batched-tokens",
                "2048",
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
                "--gpu-memory-utilization",
                "0.3",
                *arguments,
            ]

        # The development mode has the calls of workers by which the numbers are checked.
        self.server = server_class(
            folder / "log", command, VLLM_SERVER_DEV_MODE="1", TMPDIR=str(self.temporary), **environment
        )

    def ask(self, path: str, **given) -> str:
        return self.server.ask(path, json.dumps(given).encode() if given else None)

    def complete(self, length: int, **extra) -> str:
        answer = self.ask(
            "/v1/completions",
            model="demo",
            prompt=list(range(5, 5 + length)),
            max_tokens=24,
            temperature=0,
            ignore_eos=True,
            **extra,
        )
        return json.loads(answer)["choices"][0]["text"]

    def counts(self) -> list[Counts]:
        """By rank, as the workers say."""
        return [Counts(**one) for one in json.loads(self.ask("/collective_rpc", method="specattn_stats"))["results"]]

    def metrics(self) -> dict[tuple, float]:
        """(name, values of the labels but `engine`, in the order of their names) -> value."""
        return {
            (sample.name, *(value for label, value in sorted(sample.labels.items()) if label != "engine")): sample.value
            for family in text_string_to_metric_families(self.ask("/metrics"))
            for sample in family.samples
        }

    def metrics_once(self, expected: dict[tuple, float]) -> dict[tuple, float]:
        """The metrics, as soon as they have what is expected; they may be seconds late."""
        deadline = time.monotonic() + 15
        while True:
            seen = self.metrics()
            different = {key: (seen.get(key), value) for key, value in expected.items() if seen.get(key) != value}
            if not different:
                return seen
            assert time.monotonic() < deadline, different
            time.sleep(0.2)

    def remove(self) -> None:
        self.server.stop()
        shutil.rmtree(self.temporary)


@pytest.fixture
def server(server_class, tmp_path):
    """server(*arguments, others=(), **environment) -> a server that answers. others: arguments of a second process
    beside it."""
    started = []

    def start(*arguments: str, others: tuple[str, ...] = (), **environment: str) -> Served:
        for given in [others, ()] if others else [()]:
            (folder := tmp_path / f"{len(started)}").mkdir()
            started.append(Served(server_class, folder, *arguments, *given, **environment))
        started[-1].server.wait_until_ready()
        return started[-1]

    yield start
    for one in started:
        one.remove()
