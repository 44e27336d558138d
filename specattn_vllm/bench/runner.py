"""Runs jobs, each in a process of its own, one at a time or one per GPU, and keeps the report up to date after each.

An engine that fails is a result like others: the report says so and why, with what it had measured
until then. Reports and jobs may be others with the same fields: those of servers (`serve/schema.py`).
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from specattn_vllm.bench.jobs import MODES
from specattn_vllm.bench.schema import NO_ROOM, EngineResult, Job
from specattn_vllm.causes import of_log
from specattn_vllm.installed import UserError
from specattn_vllm.tools import engines
from specattn_vllm.tools.interrupts import ended_as_interrupted, resumed, status_of
from specattn_vllm.tools.outputs import check_same

WORKER = (*engines.MODULE, "specattn_vllm.bench.worker")


def run_job(job: Job, folder: Path, gpu: str | None = None, stop: threading.Event | None = None) -> EngineResult:
    """One engine from start to end. Its job, log and result stay in `folder`. `stop` ends it early."""
    start, variables = time.monotonic(), engines.environment(job.environment, cpu=job.on_cpu, gpu=gpu)
    ended = engines.run_job(WORKER, job.name, job, folder, variables, stop or threading.Event())
    if ended.result is None:
        result = EngineResult(name=job.name, status="failed", job=job)
    else:
        result = EngineResult.model_validate(ended.result)
    if ended.interrupted:
        result.status, result.reason = "interrupted", "ended before it was done"
    elif result.status != "ok" and result.reason != NO_ROOM:  # of which the log would tell nothing
        # Killed from outside, e.g. for its memory: the worker itself could not say so.
        killed = f"ended with exit status {ended.status}" if ended.status else None
        result.reason = of_log(ended.log.read_text(errors="replace")) or killed or result.reason or "left no result"
    result.log = f"{folder.name}/{ended.log.name}"  # the report may travel to another machine, with the folder
    result.seconds = round(time.monotonic() - start, 1)
    return result


def outcome(result: EngineResult) -> str:
    """One line on an engine that has ended."""
    speeds = ", ".join(f"{cell.name} {cell.tokens_per_second:,.0f}" for cell in result.cells if cell.tokens_per_second)
    parts = [f"{speeds} tokens/s"] if speeds else []
    if result.status != "ok":
        parts = [f"{result.status}: {result.reason} (log: {result.log})", *(f"until then {part}" for part in parts)]
    return "; ".join([*parts, *(f"{cell.name} {cell.skipped}" for cell in result.cells if cell.skipped)])


def earlier_engines(path: Path, report: Any) -> dict[str, Any]:
    """Engine name -> result of an earlier run with the same settings, to go on with."""
    if not path.is_file():
        return {}
    try:
        earlier = type(report).model_validate_json(path.read_text())
    except ValidationError:
        raise UserError(f"{path} is no such report of `specattn bench`: give another --out, or --overwrite") from None
    check_same(path, earlier.settings, report.settings)
    return {engine.name: engine for engine in earlier.engines}


Run = Callable[[Any, Path, str | None, threading.Event, Callable[[Any], None]], Any]
"""Runs a job, with its logs in a folder, on a GPU, until it is told to stop; what is called last keeps what there is of
the result meanwhile."""


def _run_engine(job: Job, folder: Path, gpu: str | None, stop: threading.Event, keep: Callable) -> EngineResult:
    return run_job(job, folder, gpu, stop)


def run_all(
    jobs: Sequence[Any],
    report: Any,
    path: Path,
    folder: Path,
    earlier: Mapping[str, Any],
    gpus: Sequence[str] = (),
    say: Callable[[str], None] = print,
    *,
    what: str = "engine",
    run: Run = _run_engine,
    told: Callable[[Any], str] = outcome,
) -> None:
    """Runs what is not measured yet, and writes `report` to `path` after each engine.

    After Ctrl-C it writes what there is, and passes it on. Engines of `earlier` that no job names stay in the report: a
    table may grow by a mode at a time. `gpus`: as many engines at a time, each on a GPU of its own.
    """
    found, lock = dict(earlier), threading.Lock()

    def write() -> None:
        # Columns in a fixed order: modes as listed, then those of older versions; of one mode what keeps most first.
        place = {mode: number for number, mode in enumerate(MODES)}
        report.engines = sorted(
            found.values(), key=lambda of: (place.get(of.job.mode, len(place)), -(of.job.kept or 0))
        )
        report.write(path)

    def keep(result: Any) -> None:
        result.provenance = report.provenance
        with lock:  # of an engine that runs, in its thread
            found[result.name] = result
            write()

    def ended(result: Any) -> None:
        keep(result)
        say(f"{result.name}: {told(result)}")

    def one(job: Any, gpu: str | None, stop: threading.Event) -> Any:
        return run(job, folder, gpu, stop, keep)

    def is_measured(job: Any) -> bool:
        return job.name in found and found[job.name].status == "ok" and found[job.name].job == job

    write()
    engines.run_each(what, [job for job in jobs if not is_measured(job)], one, ended, say, gpus)


def refuse_to_overwrite(args: argparse.Namespace) -> None:
    if args.out.exists() and not (args.resume or args.overwrite):
        raise UserError(f"{args.out} is there already: --resume goes on with it, --overwrite starts anew")


def carry_out(
    jobs: Sequence[Any], report: Any, args: argparse.Namespace, markdown: Callable[[Any], str], **how: Any
) -> int:
    """`run_all` as a command does it, by the arguments of `tools.arguments.add_running`. Prints the table; returns the
    exit status."""
    refuse_to_overwrite(args)
    earlier = earlier_engines(args.out, report) if args.resume else {}
    folder, interrupt = args.out.with_suffix(".logs"), None
    try:
        with ended_as_interrupted():
            run_all(jobs, report, args.out, folder, earlier, **how)
    except KeyboardInterrupt as found:
        interrupt = found
    print(f"\n{markdown(report)}\n{args.out}; logs in {folder}")
    if interrupt is not None:
        print(f"interrupted; this goes on with it: {resumed('--resume')}")
        return status_of(interrupt)
    ran = {engine.name for engine in report.engines if engine.status == "ok"}
    return 0 if {job.name for job in jobs} <= ran else 1
