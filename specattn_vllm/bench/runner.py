"""Runs jobs, each in a process of its own, one at a time or one per GPU, and keeps the report up to date after each.

An engine that fails is a result like others: the report says so and why, with what it had measured
until then.
"""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from specattn_vllm.bench.jobs import MODES
from specattn_vllm.bench.schema import NO_ROOM, EngineResult, Job, Report
from specattn_vllm.causes import LONGEST, of_lines
from specattn_vllm.installed import UserError
from specattn_vllm.tools import engines
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
        result.reason = _cause(ended.log.read_text(errors="replace")) or killed or result.reason or "left no result"
    result.log = f"{folder.name}/{ended.log.name}"  # the report may travel to another machine, with the folder
    result.seconds = round(time.monotonic() - start, 1)
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


def outcome(result: EngineResult) -> str:
    """One line on an engine that has ended."""
    speeds = ", ".join(f"{cell.name} {cell.tokens_per_second:,.0f}" for cell in result.cells if cell.tokens_per_second)
    parts = [f"{speeds} tokens/s"] if speeds else []
    if result.status != "ok":
        parts = [f"{result.status}: {result.reason} (log: {result.log})", *(f"until then {part}" for part in parts)]
    return "; ".join([*parts, *(f"{cell.name} {cell.skipped}" for cell in result.cells if cell.skipped)])


def earlier_engines(path: Path, report: Report) -> dict[str, EngineResult]:
    """Engine name -> result of an earlier run with the same settings, to go on with."""
    if not path.is_file():
        return {}
    try:
        earlier = Report.model_validate_json(path.read_text())
    except ValidationError:
        raise UserError(f"{path} is no report of `specattn bench`: give another --out, or --overwrite") from None
    check_same(path, earlier.settings, report.settings)
    return {engine.name: engine for engine in earlier.engines}


def run_all(
    jobs: list[Job],
    report: Report,
    path: Path,
    folder: Path,
    earlier: Mapping[str, EngineResult],
    gpus: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> None:
    """Runs what is not measured yet, and writes `report` to `path` after each engine.

    After Ctrl-C it writes what there is, and passes it on. Engines of `earlier` that no job names stay in the report: a
    table may grow by a mode at a time. `gpus`: as many engines at a time, each on a GPU of its own.
    """
    found = dict(earlier)

    def write() -> None:
        # Columns in a fixed order: modes as listed, then those of older versions; of one mode what keeps most first.
        place = {mode: number for number, mode in enumerate(MODES)}
        report.engines = sorted(
            found.values(), key=lambda of: (place.get(of.job.mode, len(place)), -(of.job.kept or 0))
        )
        report.write(path)

    def keep(result: EngineResult) -> None:
        result.provenance = report.provenance
        found[result.name] = result
        write()
        say(f"{result.name}: {outcome(result)}")

    def run(job: Job, gpu: str | None, stop: threading.Event) -> EngineResult:
        return run_job(job, folder, gpu, stop)

    def is_measured(job: Job) -> bool:
        return job.name in found and found[job.name].status == "ok" and found[job.name].job == job

    write()
    engines.run_each("engine", [job for job in jobs if not is_measured(job)], run, keep, say, gpus)
