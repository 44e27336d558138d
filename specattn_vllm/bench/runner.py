"""Runs jobs, of engines or of servers, each in a process of its own, one at a time or one per GPU, and keeps the report
up to date after each.

One that fails is a result like others: the report says so and why, with what it had measured until then.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from specattn_vllm.bench.jobs import MODES
from specattn_vllm.bench.schema import NO_ROOM, UNFINISHED, AnyReport, OfEngine, Result
from specattn_vllm.causes import of_log
from specattn_vllm.installed import UserError
from specattn_vllm.tools import engines, outputs
from specattn_vllm.tools.interrupts import ended_as_interrupted, resumed, status_of


def run_job(
    job: OfEngine,
    kind: type[Result],
    folder: Path,
    gpu: str | None = None,
    stop: threading.Event | None = None,
    keep: Callable[[Result], None] = lambda result: None,
) -> Result:
    """One engine or server from start to end. Its job, log and result, of a `kind`, stay in `folder`. `stop` ends it
    early; `keep` is called with what there is meanwhile."""
    start, variables = time.monotonic(), engines.environment(job.environment, cpu=job.on_cpu, gpu=gpu)
    ended = engines.run_job(
        job.worker, job, folder, variables, stop, watch=lambda found: keep(kind.model_validate(found))
    )
    result = kind(name=job.name, job=job) if ended.result is None else kind.model_validate(ended.result)
    if ended.interrupted:
        result.end(*UNFINISHED)
    elif result.status != "ok" and result.reason != NO_ROOM:  # of which the log would tell nothing
        # If the worker could not say why, it was killed from outside, e.g. for its memory.
        told = result.reason if result.status == "failed" else None
        cause = of_log(ended.log.read_text(errors="replace"))
        result.end("failed", cause or told or f"ended with exit status {ended.status}")
    # The report may travel to another machine, with the folder.
    result.log = result.log or f"{folder.name}/{ended.log.name}"
    result.seconds = round(time.monotonic() - start, 1)
    return result


def earlier_engines(path: Path, report: AnyReport) -> dict[str, Result]:
    """Name -> result of an earlier run with the same settings, to go on with."""
    found = outputs.earlier(path, "specattn bench", type(report), "settings", report.settings)
    return {} if found is None else {engine.name: engine for engine in found.engines}


def run_all(
    jobs: Sequence[OfEngine],
    report: AnyReport,
    path: Path,
    folder: Path,
    earlier: Mapping[str, Result],
    gpus: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> None:
    """Runs what is not measured yet, and writes `report` to `path` after each, and whenever one has more.

    After Ctrl-C it writes what there is, and passes it on. Results of `earlier` that no job names stay in the report: a
    table may grow by a mode at a time. `gpus`: as many at a time, each on a GPU of its own.
    """
    found, lock = dict(earlier), threading.Lock()
    # Columns in a fixed order: modes as listed, then those of older versions; of one mode what keeps most first.
    place = {mode: number for number, mode in enumerate(MODES)}

    def write() -> None:
        report.engines = sorted(
            found.values(), key=lambda of: (place.get(of.job.mode, len(place)), -(of.job.kept or 0))
        )
        report.write(path)

    def keep(result: Result) -> None:
        result.provenance = report.provenance
        with lock:  # of one that runs, in its thread
            found[result.name] = result
            write()

    def ended(result: Result) -> None:
        keep(result)
        say(f"{result.name}: {result.told()}")

    def one(job: OfEngine, gpu: str | None, stop: threading.Event) -> Result:
        before = None

        def meanwhile(result: Result) -> None:
            nonlocal before
            for line in result.news(before):
                say(f"{result.name}: {line}")
            before = result
            keep(result)

        return run_job(job, report.result, folder, gpu, stop, meanwhile)

    def is_measured(job: OfEngine) -> bool:
        return job.name in found and found[job.name].status == "ok" and found[job.name].job == job

    write()
    engines.run_each(report.what, [job for job in jobs if not is_measured(job)], one, ended, say, gpus)


def refuse_to_overwrite(args: argparse.Namespace) -> None:
    if args.out.exists() and not (args.resume or args.overwrite):
        raise UserError(f"{args.out} is there already: --resume goes on with it, --overwrite starts anew")


def carry_out(
    jobs: Sequence[OfEngine], report: AnyReport, args: argparse.Namespace, markdown: Callable[[Any], str]
) -> int:
    """`run_all` as a command does it, by the arguments of `tools.arguments.add_running`. Prints the table; returns the
    exit status."""
    refuse_to_overwrite(args)
    earlier = earlier_engines(args.out, report) if args.resume else {}
    folder, interrupt = args.out.with_suffix(".logs"), None
    try:
        with ended_as_interrupted():
            run_all(jobs, report, args.out, folder, earlier, getattr(args, "gpus", ()))
    except KeyboardInterrupt as found:
        interrupt = found
    print(f"\n{outputs.fitted(markdown(report))}\n{args.out}; logs in {folder}")
    if interrupt is not None:
        print(f"interrupted; this goes on with it: {resumed('--resume')}")
        return status_of(interrupt)
    ran = {engine.name for engine in report.engines if engine.status == "ok"}
    return 0 if {job.name for job in jobs} <= ran else 1
