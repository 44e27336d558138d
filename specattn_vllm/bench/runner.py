"""Runs jobs, each in a process of its own, one at a time or one per GPU, and keeps the report up to date after each.

An engine that fails or takes too long is a result like others: the report says so and why, with what it had measured
until then.
"""

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from specattn_vllm import cpu_runner
from specattn_vllm.bench.grid import MODES
from specattn_vllm.bench.schema import NO_ROOM, EngineResult, Job, Report, Status
from specattn_vllm.causes import LONGEST, of_lines

POLL_SECONDS = 0.5
GRACE_SECONDS = 10.0
Watcher = Callable[[Job, list[dict[str, Any]]], None]
"""Called now and then with a job that runs and its events up to then."""


class SettingsDiffer(ValueError):
    """A report to go on with that is about something else."""


def worker_command() -> list[str]:
    # -P: a checkout's folder `kernels` must not hide a package of that name.
    return [sys.executable, "-P", "-m", "specattn_vllm.bench.worker"]


def worker_environment(job: Job, current: Mapping[str, str], gpu: str | None = None) -> dict[str, str]:
    environment = dict(current)
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    if job.environment.get("TRITON_INTERPRET") == "1":
        environment |= cpu_runner.environment(current)
    for name, value in job.environment.items():
        if value is None:
            environment.pop(name, None)
        else:
            environment[name] = value
    return environment


def file_name(job: Job) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", job.name.lower()).strip("-")


@contextmanager
def _group_of(command: list[str], **arguments: Any) -> Iterator[subprocess.Popen]:
    """A process, ended at the end with all its children: vLLM's own processes do not end with the one they serve."""
    process = subprocess.Popen(command, start_new_session=True, **arguments)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # its children it ends itself
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_job(
    job: Job,
    folder: Path,
    timeout: float,
    watch: Watcher = lambda job, events: None,
    gpu: str | None = None,
    stop: threading.Event | None = None,
) -> EngineResult:
    """One engine from start to end. Its job, log, events and result stay in `folder`. `stop` ends it early."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"{file_name(job)}.{kind}" for kind in ("job.json", "result.json", "events", "log")}
    for path in paths.values():
        path.unlink(missing_ok=True)
    paths["job.json"].write_text(job.model_dump_json(indent=2) + "\n")
    arguments = [str(paths[kind]) for kind in ("job.json", "result.json", "events")]
    start, status, reason = time.monotonic(), None, None
    with (
        paths["log"].open("w") as log,
        _group_of(
            [*worker_command(), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=worker_environment(job, os.environ, gpu),
        ) as process,
    ):
        while process.poll() is None:
            if stop is not None and stop.is_set():
                status, reason = "interrupted", "ended before it was done"
                break
            if time.monotonic() - start > timeout:
                status, reason = "timeout", f"took longer than {timeout:g} s (--engine-timeout)"
                break
            watch(job, read_events(paths["events"]))
            time.sleep(POLL_SECONDS)
    result = _result(job, paths, status, reason, process.returncode)
    result.log = f"{folder.name}/{paths['log'].name}"  # the report may travel to another machine, with the folder
    result.seconds = round(time.monotonic() - start, 1)
    return result


def _result(
    job: Job, paths: dict[str, Path], status: Status | None, reason: str | None, returncode: int
) -> EngineResult:
    if paths["result.json"].is_file():
        result = EngineResult.model_validate_json(paths["result.json"].read_text())
    else:
        result = EngineResult(name=job.name, status="failed", job=job, job_key=job.key)
    if status is not None:
        result.status, result.reason = status, reason
        return result
    if result.reason == NO_ROOM:
        return result  # nothing went wrong that the log would tell of
    if returncode and result.status != "ok":
        # Killed from outside, e.g. for its memory: the worker itself could not say so.
        result.reason = f"ended with exit status {returncode}"
    if result.status == "failed":
        result.reason = _cause(paths["log"].read_text(errors="replace")) or result.reason or "ended without a result"
    return result


def _cause(log: str) -> str | None:
    """The first error that the log names: what follows it, "engine core initialization failed", tells less."""
    # In front of a line may stand which process and which of its lines of code it is from.
    lines = [re.sub(r"^(?:\([^)]*\) )?(?:ERROR [^\]]*\] )?", "", line) for line in log.splitlines()]
    for index, line in enumerate(lines):
        if re.match(r"[\w.]*(?:Error|Exception): .", line):
            # pydantic's own first line says how many errors there are, the two after it which one and where.
            if "ValidationError: " in line:
                return " ".join(part.strip() for part in lines[index + 1 : index + 3])[:300]
            # A heading has its reasons in indented lines below it.
            below = itertools.takewhile(lambda part: part.startswith("  "), lines[index + 1 :])
            name, message = line.split(": ", 1)
            return of_lines(name.rpartition(".")[2], [message, *(below if line.endswith(":") else ())])[:LONGEST]
    return None


def read_events(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = path.read_text().splitlines()
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            break  # being written just now
    return events


def earlier_engines(path: Path, report: Report) -> dict[str, EngineResult]:
    """Engine name -> result of an earlier run with the same settings, to go on with."""
    if not path.is_file():
        return {}
    earlier = Report.model_validate_json(path.read_text())
    if earlier.settings != report.model_dump(mode="json")["settings"]:
        names = {*earlier.settings, *report.settings}
        differing = sorted(n for n in names if earlier.settings.get(n) != report.settings.get(n))
        raise SettingsDiffer(f"{path} is about something else: {', '.join(differing)} differ")
    return {engine.name: engine for engine in earlier.engines}


def run_all(
    jobs: list[Job],
    report: Report,
    path: Path,
    folder: Path,
    timeout: float,
    earlier: Mapping[str, EngineResult],
    keep_going: bool = True,
    rerun: bool = False,
    gpus: Sequence[str] = (),
    watch: Watcher = lambda job, events: None,
    done: Callable[[EngineResult], None] = lambda result: None,
) -> None:
    """Runs what is not measured yet, and writes `report` to `path` after each engine.

    After Ctrl-C it writes what there is, and passes it on.

    Engines of `earlier` that no job names stay in the report: a table may grow by a mode at a time. `rerun` measures
    anew what is there, after a change of the code, say. `gpus`: as many engines at a time, each on a GPU of its own.
    """
    found = dict(earlier)
    report.engines = sort_engines(list(found.values()))
    wanted = []
    for job in jobs:
        before = found.get(job.name)
        if before is not None and before.status == "ok" and before.job_key == job.key and not rerun:
            done(before)
        else:
            wanted.append(job)
    stop = threading.Event()
    free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for gpu in gpus or (None,):
        free.put(gpu)

    def run(job: Job) -> EngineResult | None:
        if stop.is_set():
            return None
        gpu = free.get()
        try:
            result = run_job(job, folder, timeout, watch, gpu, stop)
        finally:
            free.put(gpu)
        if result.status != "ok" and not keep_going:
            stop.set()  # here, because this thread takes the next job at once
        return result

    def keep(future: Future[EngineResult | None]) -> None:
        result = future.result()
        if result is None:
            return
        result.provenance = report.provenance
        found[result.name] = result
        report.engines = sort_engines(list(found.values()))
        report.write(path)
        done(result)

    with ThreadPoolExecutor(len(gpus) or 1) as pool:
        futures = [pool.submit(run, job) for job in wanted]
        kept: set[Future] = set()
        try:
            for future in as_completed(futures):
                kept.add(future)
                keep(future)
        except KeyboardInterrupt:
            stop.set()
            for future in futures:
                if future not in kept:
                    keep(future)
            report.write(path)
            raise
    report.write(path)


def sort_engines(engines: list[EngineResult]) -> list[EngineResult]:
    """Columns in a fixed order: modes as listed, and of one mode what keeps most first."""
    return sorted(engines, key=lambda engine: (MODES.index(engine.job.mode), -(engine.job.kept or 0)))
