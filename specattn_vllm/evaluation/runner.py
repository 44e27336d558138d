"""Runs settings, each in a process of its own, one at a time or one per GPU, and keeps the report up to date."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import queue
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from specattn_vllm import cpu_runner
from specattn_vllm.causes import told
from specattn_vllm.evaluation.figures import rows_of
from specattn_vllm.evaluation.job import Job
from specattn_vllm.evaluation.results import COMMAND, Report, SettingResult
from specattn_vllm.installed import UserError
from specattn_vllm.tools.outputs import write_json
from specattn_vllm.tools.remaining import Remaining

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run_all(
    jobs: list[Job],
    report: Report,
    out: Path,
    order: list[str],
    *,
    keep_reference: bool = False,
    gpus: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> list[str]:
    """Run what the report does not have yet, the dense setting first; returns the names of those that failed.

    Results stand in the order of the names in `order`, whichever of them are run now; the dense one goes first. `gpus`:
    as many settings at a time, each on a GPU of its own, once the dense one is done.
    """
    prepare_environment(jobs[0].device)
    reference = out.with_suffix(".reference")
    have = {result.job_key: result for result in report.results}
    missing = [job for job in jobs if job.key not in have or not has_all(job, have[job.key])]
    if not missing:
        say(f"all {len(jobs)} settings are measured already in {out}")
        return []
    dense = jobs[0]
    if not is_for(reference, dense) and dense not in missing:
        say(f"{dense.setting.name}: measured already, but what the others are compared with is gone")
        missing.insert(0, dense)
    failed = []
    logs = out.with_suffix(".logs")
    remaining = Remaining("setting", len(missing))

    def begin(job: Job) -> None:
        say(f"{remaining.begin()}: {job.setting.name}")

    for job, outcome in outcomes(missing, dense, reference, logs, gpus, begin):
        left = remaining.end()
        if isinstance(outcome, str):
            say(f"{job.setting.name}: failed: {outcome} (log: {log_of(job, logs)})")
            if job is dense:
                say("no other setting was measured: they are compared with this one")
            failed.append(job.setting.name)
            continue
        outcome.provenance = report.provenance
        say(f"{job.setting.name}: {outcome.seconds:.0f} s" + (f"; {left}" if left else ""))
        kept = [result for result in report.results if result.name != outcome.name]
        place = {name: index for index, name in enumerate(order)} | {dense.setting.name: -1}
        report.results = sorted([*kept, outcome], key=lambda result: place.get(result.name, len(place)))
        for result, found in rows_of(report):
            result.figures = found
        write_json(out, report.model_dump(mode="json"))
    if not failed and not keep_reference:
        shutil.rmtree(reference)
    return failed


def has_all(job: Job, result: SettingResult) -> bool:
    """Whether an earlier result of this job, by its key, has all that is asked for now."""
    return not job.record_kept or not job.setting.selects or result.kept is not None


def outcomes(
    jobs: list[Job],
    dense: Job,
    reference: Path,
    logs: Path,
    gpus: Sequence[str],
    begin: Callable[[Job], None] = lambda job: None,
) -> Iterator[tuple[Job, SettingResult | str]]:
    """Each job with its result, or why there is none, as soon as it is done. Without the dense one's nothing follows,
    for want of what the others are compared with."""
    free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for gpu in gpus or (None,):
        free.put(gpu)

    def run(job: Job) -> tuple[Job, SettingResult | str]:
        gpu = free.get()
        begin(job)
        try:
            return job, in_own_process(job, reference, log_of(job, logs), gpu)
        finally:
            free.put(gpu)

    if dense in jobs:
        first = run(dense)
        yield first
        if isinstance(first[1], str):
            return
    pool = ThreadPoolExecutor(len(gpus) or 1)
    futures = [pool.submit(run, job) for job in jobs if job is not dense]
    try:
        for done in as_completed(futures):
            yield done.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)  # an interrupt ends what runs, and nothing begins after it
        while not all(future.done() for future in futures):  # one may be about to start
            for process in RUNNING.copy():
                end(process)
            time.sleep(0.1)
        raise
    finally:
        pool.shutdown()


def log_of(job: Job, logs: Path) -> Path:
    return logs / f"{re.sub(r'[^a-z0-9.]+', '-', job.setting.name.lower()).strip('-')}.log"


def prepare_environment(device: str) -> None:
    """What engines find in this process and those it starts. The engine has to run in the process that asks for it,
    where it can be led."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if device == "cpu":
        os.environ.update(cpu_runner.environment())
        if str(cpu_runner.OVERLAY) not in sys.path:
            sys.path.insert(0, str(cpu_runner.OVERLAY))  # which spawned processes take over


def is_for(reference: Path, dense: Job) -> bool:
    """Whether the folder holds the distributions of this dense run, all of them."""
    try:
        return json.loads((reference / "complete.json").read_text())["job_key"] == dense.key
    except (OSError, ValueError, KeyError):
        return False


def in_own_process(job: Job, reference: Path, log: Path, gpu: str | None = None) -> SettingResult | str:
    """The result, or in words why there is none. A process of its own gives back all of a GPU's memory at its end."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        process = None
        try:
            process = pool.submit(os.getpid).result()
            RUNNING.add(process)
            return pool.submit(_measure, job, reference, log, gpu).result()
        except BrokenProcessPool:
            return "its process ended before it was done, as it does when memory runs out"
        except KeyboardInterrupt:
            # Ctrl-C reaches it too, SIGTERM does not; and the pool would wait for its end.
            if process is not None:
                end(process)
            raise
        finally:
            RUNNING.discard(process)


RUNNING: set[int] = set()
"""Processes of engines."""


def end(process: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def _measure(job: Job, reference: Path, log: Path, gpu: str | None = None) -> SettingResult | str:
    """In the new process: what vLLM and its libraries print goes to the log, progress to the terminal."""
    # Linux ends this process with the one that waits for it: an engine that nobody waits for would hold its GPU.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # CUDA looks when it is first used
    terminal = os.fdopen(os.dup(2), "w")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    complete = reference / "complete.json"
    leaves_reference = job.setting.is_reference
    if leaves_reference:
        reference.mkdir(parents=True, exist_ok=True)
        complete.unlink(missing_ok=True)
    try:
        from specattn_vllm.evaluation.engine import run

        result = run(job, reference, terminal).result
    except Exception as error:
        traceback.print_exc()
        return told(error)
    if leaves_reference:
        write_json(complete, {"job_key": job.key})
    return result


def earlier(out: Path, setup: dict[str, Any]) -> list[SettingResult]:
    """The results of a report that is to be gone on with; refused if it is about something else."""
    if not out.exists():
        return []
    try:
        report = Report.model_validate_json(out.read_bytes())
    except ValidationError:
        raise UserError(f"{out} is no report of `{COMMAND}`: give another --out, or --overwrite") from None
    differing = [key for key in setup if report.setup.get(key) != setup[key]]
    if differing:
        raise UserError(
            f"{out} was measured with another {', '.join(differing)}: give another --out, or --overwrite to start anew"
        )
    return report.results
