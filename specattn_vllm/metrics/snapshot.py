"""A worker's counts as a file, which a server reads when metrics are requested.

Counters are in the worker's process, but another process answers `/metrics`. The first process of an engine makes a
folder and puts its path into the environment, which all processes that it starts inherit. Each worker has one file in
it.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from specattn_vllm import data_file
from specattn_vllm.stats import Counts

LARGEST = 2**20
"""Bytes of a snapshot's file. One has some thousands."""
FOLDER = "SPECATTN_METRICS_DIR"
"""Environment variable: the folder of the snapshots. If it is not set, nothing is published."""
INFO = ("method", "lossless", "budget", "executor", "version", "vllm", "model_name")
"""What `Snapshot.info` has."""
FOR_RAY = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"
"""vLLM's environment variable: names of others that processes which Ray starts get too, with commas between them."""


@dataclass(frozen=True)
class Cache:
    """Bytes that are read from a cache, for one token, KV head and layer."""

    entry: int
    """Bytes of a key and a value."""
    code: int = 0
    """Bytes of the sketch that is searched to choose entries; 0: there is no search."""


@dataclass(frozen=True)
class Audited:
    """Retained mass from audits. A sample is one query head of a (layer, request) pair."""

    buckets: list[tuple[float, int]]
    """(upper bound, number of samples up to it)."""
    total: float
    """Sum over all samples."""


@dataclass(frozen=True)
class Snapshot:
    """The state of one worker at one moment. Totals are since its start."""

    engine: int
    """Index of the engine among data-parallel engines."""
    rank: int
    """Rank of the worker in its engine."""
    pid: int
    info: Mapping[str, str]
    dense_reasons: tuple[str, ...]
    """`Method.dense_reasons`. Without them, rows are not counted."""
    drafts: bool
    """Whether there is a drafter. Without one there are no rounds."""
    caches: Mapping[str, Cache]
    """The caches that are read sparsely, by their reader: 'verification' or 'drafting'."""
    counts: Counts = field(default_factory=Counts)
    audited: Audited | None = None

    def write(self, folder: Path) -> None:
        """Replace the worker's file atomically: a reader finds either this snapshot or the one before. OSError if
        somebody has put a link or a pipe in its place: nothing is written through it."""
        path = folder / f"{self.engine}-{self.rank}-{self.pid}.json"
        part = path.with_suffix(".part")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK
        with open(os.open(part, flags, 0o666), "w") as file:
            file.write(json.dumps(asdict(self)))
        part.replace(path)


_KIND = TypeAdapter(Snapshot)


def folder() -> Path | None:
    """The folder in which workers publish; None if they do not publish."""
    named = os.environ.get(FOLDER)
    return Path(named) if named else None


def make_folder() -> None:
    """Make the folder, unless there is one, and put its path into the environment for processes that are started later.
    The folder is removed when this process ends."""
    if os.environ.get(FOLDER):
        return
    made = tempfile.mkdtemp(prefix="specattn-metrics-")
    os.environ[FOLDER] = made
    # Not every way in which vLLM starts processes with Ray hands on all variables (data parallelism does not).
    os.environ[FOR_RAY] = ",".join([*filter(None, [os.environ.get(FOR_RAY)]), FOLDER])
    owner = os.getpid()

    def remove() -> None:
        # A forked process must not remove the folder of its parent.
        if os.getpid() == owner:
            shutil.rmtree(made, ignore_errors=True)

    atexit.register(remove)


def read_all(where: Path) -> list[Snapshot]:
    """The snapshots of all live workers, sorted by engine and rank."""
    return sorted(_read(where), key=lambda found: (found.engine, found.rank, found.pid))


def _read(where: Path) -> Iterator[Snapshot]:
    for path in where.glob("*.json"):
        try:
            # Whatever else is in the folder must not take vLLM's own metrics away.
            found = _KIND.validate_json(data_file.read(path, LARGEST), strict=True)
        except (OSError, ValidationError):
            continue  # the file has been removed, or is not a snapshot
        if not {*INFO} <= {*found.info}:
            continue
        if _lives(found.pid):
            yield found


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
