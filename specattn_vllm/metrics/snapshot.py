"""What a worker counted, as a file: a server reads it when it is asked for metrics.

Counters live in the worker's process, and `/metrics` is answered by another. The first process of an engine makes a
folder and names it in the environment, which the processes that it starts inherit. Each worker has one file there.
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
from typing import Any

from specattn_vllm.stats import Counts

FOLDER = "SPECATTN_METRICS_DIR"
"""Environment variable: the folder of the snapshots. Where it is not set nothing is published."""


@dataclass(frozen=True)
class Cache:
    """What reading from a cache costs, for one token, KV head and layer."""

    entry: int
    """Bytes of a key and a value."""
    code: int = 0
    """Bytes of the sketch that is searched before a part of the entries is read; 0: nothing is searched."""


@dataclass(frozen=True)
class Audited:
    """The retained mass that audits measured, by query head of a pair of layer and request."""

    buckets: list[tuple[float, int]]
    """(upper bound, how many up to it)."""
    total: float


@dataclass(frozen=True)
class Snapshot:
    """One worker at one moment. Totals are since its start."""

    engine: int
    """Index of the engine among data-parallel ones."""
    rank: int
    """The worker among those of its engine."""
    pid: int
    info: Mapping[str, str]
    rows: str
    """What chooses for the target: 'own choice', "draft's choice", or 'everything', where rows are not counted."""
    drafts: bool
    """Whether there is a drafter, and so rounds."""
    caches: Mapping[str, Cache]
    """The caches of which a part is read, by what reads it: 'verification' and 'drafting'."""
    counts: Counts = field(default_factory=Counts)
    audited: Audited | None = None

    def write(self, folder: Path) -> None:
        """Into the worker's file, whole: whoever reads finds this one or the one before."""
        path = folder / f"{self.engine}-{self.rank}-{self.pid}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self)))
        part.replace(path)

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        data: dict[str, Any] = json.loads(text)
        audited = data.pop("audited")
        return cls(
            **data
            | {
                "counts": Counts(**data["counts"]),
                "caches": {by: Cache(**cache) for by, cache in data["caches"].items()},
                "audited": audited and Audited([(edge, n) for edge, n in audited["buckets"]], audited["total"]),
            }
        )


def folder() -> Path | None:
    """Where workers publish; None where they do not."""
    named = os.environ.get(FOLDER)
    return Path(named) if named else None


def make_folder() -> None:
    """Make the folder, unless there is one, and name it for the processes that are started from here on. It goes when
    this process ends."""
    if os.environ.get(FOLDER):
        return
    made = tempfile.mkdtemp(prefix="specattn-metrics-")
    os.environ[FOLDER] = made
    owner = os.getpid()

    def remove() -> None:
        # A process that was forked off is not the owner.
        if os.getpid() == owner:
            shutil.rmtree(made, ignore_errors=True)

    atexit.register(remove)


def read_all(where: Path) -> list[Snapshot]:
    """The snapshots of workers that are alive, by engine and rank."""
    return sorted(_read(where), key=lambda found: (found.engine, found.rank, found.pid))


def _read(where: Path) -> Iterator[Snapshot]:
    for path in where.glob("*.json"):
        try:
            found = Snapshot.parse(path.read_text())
        except (OSError, ValueError, TypeError, KeyError):
            continue  # gone, or not ours
        if _lives(found.pid):
            yield found


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
