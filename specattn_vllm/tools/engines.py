"""Engines in processes of their own, one at a time or one per GPU, and none that is left after Ctrl-C, SIGTERM, or an
end of this process by force. A process of its own also gives back all of a GPU's memory at its end."""

from __future__ import annotations

import itertools
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from specattn_vllm import cpu_runner

POLL_SECONDS = 0.2
GRACE_SECONDS = 10.0
MODULE = (sys.executable, "-P", "-m")
"""The command that runs a module; -P: a checkout's folder `kernels` must not hide a package of that name."""

J, R = TypeVar("J"), TypeVar("R")


class Ended(NamedTuple):
    """How a job's process ended."""

    interrupted: bool
    status: int
    result: dict[str, Any] | None
    """What it left as JSON."""
    log: Path


def environment(own: Mapping[str, str], *, cpu: bool, gpu: str | None) -> dict[str, str]:
    """Of an engine's process: this one's, what a CPU takes, the GPU that it may see, and `own`."""
    there = os.environ | (cpu_runner.environment(os.environ) if cpu else {})
    return there | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}) | own


def path_of(name: str, folder: Path, kind: str) -> Path:
    """Where a job's file of a kind lies."""
    return folder / f"{re.sub(r'[^a-z0-9.]+', '-', name.lower()).strip('-')}.{kind}"


def run_watched(
    command: Sequence[str],
    log: Path,
    variables: Mapping[str, str],
    stop: threading.Event | None = None,
    seconds: float | None = None,
    watch: Callable[[], None] = lambda: None,
) -> tuple[bool, int]:
    """Runs a command, what it prints in `log`, until it ends, is told to `stop`, or `seconds` are over. Then ends all
    its children too: vLLM's own processes do not end with the one they serve. `watch` is called again and again
    meanwhile. (was it interrupted, exit status)"""
    stop = stop or threading.Event()
    with log.open("w") as file:
        into = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, **into, env=variables, start_new_session=True)
    end = None if seconds is None else time.monotonic() + seconds
    try:
        while process.poll() is None and not stop.wait(POLL_SECONDS) and (end is None or time.monotonic() < end):
            watch()
    finally:
        interrupted = process.poll() is None
        if interrupted:
            process.terminate()  # its children it ends itself
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return interrupted, process.returncode


def run_job(
    command: Sequence[str],
    job: Any,
    folder: Path,
    variables: Mapping[str, str],
    stop: threading.Event | None = None,
    *more: Path,
    watch: Callable[[dict[str, Any]], None] = lambda found: None,
) -> Ended:
    """Runs `command JOB RESULT more...`, files of JSON in `folder`, where its log is too, as `run_watched` does. `job`:
    a pydantic model with a name. `watch` is called with what RESULT holds whenever it has changed meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    given, found, log = (path_of(job.name, folder, kind) for kind in ("job.json", "result.json", "log"))
    found.unlink(missing_ok=True)
    given.write_text(job.model_dump_json() + "\n")
    seen = 0

    def look() -> None:
        nonlocal seen
        if found.exists() and (written := found.stat().st_mtime_ns) != seen:
            seen = written
            watch(json.loads(found.read_text()))

    interrupted, status = run_watched([*command, *map(str, (given, found, *more))], log, variables, stop, watch=look)
    return Ended(interrupted, status, json.loads(found.read_text()) if found.exists() else None, log)


def end_with_the_parent(seconds: float = 2.0) -> None:
    """Called in an engine's process: ends it and its children once its parent is gone, however that ended."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(seconds)
        os.killpg(0, signal.SIGKILL)

    if os.getpgrp() == os.getpid():  # as `run_watched` starts it: the group is its own
        threading.Thread(target=watch, daemon=True).start()


def run_each(
    what: str,
    jobs: Sequence[J],
    run: Callable[[J, str | None, threading.Event], R],
    keep: Callable[[R], None],
    say: Callable[[str], None],
    gpus: Sequence[str] = (),
) -> None:
    """`run(job, gpu, stop)` for each job, as many at a time as there are GPUs, else one; `keep` of its result in this
    thread, as soon as it is there. Says which of how many begins, by its name, and about how long the rest takes.

    Ctrl-C tells what runs to stop; what it has by then is kept too, nothing begins after it, and it is passed on.
    """
    stop, begun, start = threading.Event(), itertools.count(1), time.monotonic()
    free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for gpu in gpus or (None,):
        free.put(gpu)

    def one(job: J) -> R | None:
        gpu = free.get()
        try:
            if stop.is_set():
                return None
            say(f"{what} {next(begun)} of {len(jobs)}: {job.name}")
            return run(job, gpu, stop)
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(len(gpus) or 1) as pool:
        waiting = [pool.submit(one, job) for job in jobs]
        try:
            for ended, future in enumerate(as_completed(tuple(waiting)), 1):
                waiting.remove(future)
                keep(future.result())
                if left := len(jobs) - ended:
                    # As if the others took as long as those so far. What runs at a time shares the time that passed.
                    seconds = (time.monotonic() - start) / ended * left
                    say(f"{ended} of {len(jobs)} done, about {timedelta(seconds=round(seconds))} left")
        except BaseException:
            stop.set()
            for future in waiting:
                if (result := future.result()) is not None:
                    keep(result)
            raise
