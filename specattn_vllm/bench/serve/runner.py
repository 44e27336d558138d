"""Starts a worker for each server, and says what it does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specattn_vllm.bench.serve.schema import RoundResult, ServeJob, ServerResult
from specattn_vllm.causes import of_log
from specattn_vllm.tools import engines

WORKER = (*engines.MODULE, "specattn_vllm.bench.serve.worker")


def run_job(
    job: ServeJob,
    folder: Path,
    gpu: str | None,
    stop: threading.Event,
    keep: Callable[[ServerResult], None],
    say: Callable[[str], None] = print,
) -> ServerResult:
    """One server from start to end; `keep` of what there is after each round."""
    start, told, doing = time.monotonic(), 0, ""

    def watch(written: dict[str, Any]) -> None:
        nonlocal told, doing
        found = ServerResult.model_validate(written)
        for done in found.rounds[told:]:
            say(f"{job.name}: {outcome_of(done)}")
        if found.doing != doing:
            say(f"{job.name}: {found.doing}")
        told, doing = len(found.rounds), found.doing
        keep(found)

    variables = engines.environment(job.environment, cpu=job.on_cpu, gpu=gpu)
    ended = engines.run_job(WORKER, job.name, job, folder, variables, stop, watch=watch)
    if ended.result is None:
        result = ServerResult(name=job.name, status="failed", reason="left no result", job=job)
    else:
        result = ServerResult.model_validate(ended.result)
    if ended.interrupted:
        result.status, result.reason = "interrupted", "ended before it was done"
    elif result.status == "interrupted" or ended.result is None:  # the worker ended and could not say why
        cause = of_log(ended.log.read_text(errors="replace")) or f"ended with exit status {ended.status}"
        result.status, result.reason = "failed", cause
    # The report may travel to another machine, with the folder.
    result.log = f"{folder.name}/{engines.path_of(job.name, folder, 'server.log').name}"
    result.seconds = round(time.monotonic() - start, 1)
    return result


def outcome_of(done: RoundResult) -> str:
    """One line on a round."""
    if done.reason:
        return f"{done.rate} requests/s: failed, {done.reason}"
    figures = done.figures
    return (
        f"{done.rate} requests/s: {done.completed} of {done.requests} requests, "
        f"TTFT {figures['median_ttft_ms']:,.0f} ms, TPOT {figures['median_tpot_ms']:,.1f} ms (medians), "
        f"{figures['output_throughput']:,.1f} tokens/s"
    )


def outcome(result: ServerResult) -> str:
    """One line on a server that has ended."""
    if result.status == "ok":
        return f"ok, {result.seconds:.0f} s with its start"
    return f"{result.status}: {result.reason} (log: {result.log})"
