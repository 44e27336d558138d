"""Runs settings, the dense one first, and keeps the report up to date after each."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from specattn_vllm.evaluation.figures import as_json, rows_of
from specattn_vllm.evaluation.job import Job
from specattn_vllm.evaluation.results import COMMAND, Report, SettingResult
from specattn_vllm.tools import engines, outputs

# The engine has to run in the process that asks for it, where it can be led.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
WORKER = (*engines.MODULE, "specattn_vllm.evaluation.engine")


def run_all(
    jobs: list[Job],
    report: Report,
    out: Path,
    order: list[str],
    *,
    gpus: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> list[str]:
    """Run what the report does not have yet, the dense setting first; returns the names of those that failed.

    Results stand in the order of the names in `order`, whichever of them are run now; the dense one goes first. `gpus`:
    as many settings at a time, each on a GPU of its own, once the dense one is done. Without the dense one nothing
    follows, for want of what the others are compared with.
    """
    reference, logs = out.with_suffix(".reference"), out.with_suffix(".logs")
    have = {result.job_key for result in report.results}
    missing = [job for job in jobs if job.key not in have]
    if not missing:
        say(f"all {len(jobs)} settings are measured already in {out}")
        return []
    dense = jobs[0]
    if dense not in missing and not is_for(reference, dense):
        say(f"{dense.name}: measured already, but what the others are compared with is gone")
        missing.insert(0, dense)
    place = {name: index for index, name in enumerate(order)} | {dense.name: -1}
    failed: list[str] = []

    def run(job: Job, gpu: str | None, stop: threading.Event) -> tuple[Job, SettingResult | str | None]:
        return job, measured(job, reference, logs, gpu, stop)

    def keep(found: tuple[Job, SettingResult | str | None]) -> None:
        job, outcome = found
        if outcome is None:
            return
        if isinstance(outcome, str):
            say(f"{job.name}: failed: {outcome} (log: {engines.path_of(job.name, logs, 'log')})")
            failed.append(job.name)
            return
        outcome.provenance = report.provenance
        say(f"{job.name}: {outcome.seconds:.0f} s")
        kept = [result for result in report.results if result.name != outcome.name]
        report.results = sorted([*kept, outcome], key=lambda result: place.get(result.name, len(place)))
        for result, figures in rows_of(report):
            result.figures = as_json(figures)
        outputs.write_json(out, report.model_dump(mode="json"))

    if dense in missing:
        engines.run_each("reference", [dense], run, keep, say, gpus[:1])
        if failed:
            say("no other setting was measured: they are compared with this one")
            return failed
    engines.run_each("setting", [job for job in missing if job is not dense], run, keep, say, gpus)
    if not failed:
        shutil.rmtree(reference)
    return failed


def is_for(reference: Path, dense: Job) -> bool:
    """Whether the folder holds the distributions of this dense run, all of them."""
    try:
        return json.loads((reference / "complete.json").read_text())["job_key"] == dense.key
    except (OSError, ValueError, KeyError):
        return False


def measured(
    job: Job, reference: Path, folder: Path, gpu: str | None, stop: threading.Event
) -> SettingResult | str | None:
    """The result, or in words why there is none; None after an interrupt."""
    variables = engines.environment(ENVIRONMENT, cpu=job.device == "cpu", gpu=gpu)
    ended = engines.run_job(WORKER, job, folder, variables, stop, reference)
    if ended.interrupted:
        return None
    if ended.result is None:
        status = f"exit status {ended.status}"
        return f"its process ended before it was done, with {status}, as it does when memory runs out"
    return ended.result.get("failed") or SettingResult.model_validate(ended.result)


def earlier(out: Path, setup: dict[str, Any]) -> list[SettingResult]:
    """The results of a report that is to be gone on with; refused if it is about something else."""
    found = outputs.earlier(out, COMMAND, Report, "setup", setup)
    return [] if found is None else found.results
