"""The benchmark on a terminal: what runs just now, and the table at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from specattn_vllm.bench.report import caption, entries, remarks, title
from specattn_vllm.bench.schema import EngineResult, Job, Report

PHASES_PER_CELL = 3  # prefill, warm-up, measure


class Board:
    """A line per engine, kept up to date from the events of its worker."""

    def __init__(self, jobs: list[Job], progress: Progress) -> None:
        self._progress = progress
        self._tasks = {
            job.name: progress.add_task(job.name, total=2 + PHASES_PER_CELL * len(job.cells), start=False, what="waits")
            for job in jobs
        }
        self._started: set[str] = set()

    def watch(self, job: Job, events: list[dict[str, Any]]) -> None:
        task = self._tasks[job.name]
        if job.name not in self._started:
            self._started.add(job.name)
            self._progress.start_task(task)
        last = events[-1] if events else {"phase": "start", "cell": None}
        what = last["phase"] if last["cell"] is None else f"{last['cell']}: {last['phase']}"
        self._progress.update(task, completed=max(0, len(events) - 1), what=what)

    def done(self, result: EngineResult) -> None:
        task = self._tasks[result.name]
        if result.status == "ok":
            self._progress.update(task, completed=self._progress.tasks[task].total)
        self._progress.update(task, what=escape(outcome(result)))
        self._progress.stop_task(task)


class Lines:
    """The same for a log file: a line for each phase that begins."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._seen: dict[str, int] = {}
        self._start = time.monotonic()

    def watch(self, job: Job, events: list[dict[str, Any]]) -> None:
        for event in events[self._seen.get(job.name, 0) :]:
            self._say(job.name, event["phase"] if event["cell"] is None else f"{event['cell']}: {event['phase']}")
        self._seen[job.name] = len(events)

    def done(self, result: EngineResult) -> None:
        self._say(result.name, outcome(result))

    def _say(self, name: str, text: str) -> None:
        self._console.out(f"{time.monotonic() - self._start:7.1f} s  {name}: {text}", highlight=False)


def outcome(result: EngineResult) -> str:
    """One line on an engine that has ended."""
    speeds = ", ".join(f"{cell.name} {cell.tokens_per_second:,.0f}" for cell in result.cells if cell.tokens_per_second)
    if result.status == "ok":
        return f"{speeds} tokens/s" if speeds else "no cell was measured"
    return f"{result.status}: {result.reason} (log: {result.log})" + (f"; until then {speeds} tokens/s" * bool(speeds))


@contextmanager
def board(jobs: list[Job], console: Console) -> Iterator[Board | Lines]:
    if not console.is_terminal:
        yield Lines(console)
        return
    what = TextColumn("{task.fields[what]}")
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TimeElapsedColumn(), what)
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        yield Board(jobs, progress)


def table(report: Report) -> Table:
    found = Table(title=f"{report.settings['shape']}: tokens per second", caption=caption(report))
    found.add_column("requests x context", no_wrap=True)
    for engine in report.engines:
        found.add_column(title(engine), justify="right")
    for cell, row in entries(report):
        texts = [f"[red]{escape(entry.text)}[/]" if entry.losing else escape(entry.text) for entry in row]
        found.add_row(str(cell), *texts)
    return found


def show(report: Report, console: Console) -> None:
    console.print(table(report))
    for remark in remarks(report):
        console.print(escape(remark))
