"""The benchmark on a terminal: what runs just now, and the tables at the end."""

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
from specattn_vllm.tools.remaining import Remaining

PHASES_PER_CELL = 3  # prefill, warm-up, measure


class Board:
    """A line per engine, kept up to date from the events of its worker."""

    def __init__(self, jobs: list[Job], progress: Progress) -> None:
        self._progress = progress
        self._remaining = Remaining("engine", len(jobs))
        self._whole = progress.add_task("all", total=len(jobs), what="") if len(jobs) > 1 else None
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
            self._tell(self._remaining.begin())
        last = events[-1] if events else {"phase": "start", "cell": None}
        what = last["phase"] if last["cell"] is None else f"{last['cell']}: {last['phase']}"
        self._progress.update(task, completed=max(0, len(events) - 1), what=what)

    def done(self, result: EngineResult) -> None:
        task = self._tasks[result.name]
        if result.status == "ok":
            self._progress.update(task, completed=self._progress.tasks[task].total)
        self._progress.update(task, what=escape(outcome(result)))
        self._progress.stop_task(task)
        self._tell(_left(self._remaining, result.name in self._started))

    def _tell(self, what: str | None) -> None:
        if self._whole is not None:
            told = {} if what is None else {"what": what}
            self._progress.update(
                self._whole, completed=self._remaining.ended, total=self._remaining.total, **told
            )  # fmt: skip


def _left(remaining: Remaining, ran: bool) -> str | None:
    """What is left after an engine; one that an earlier run had measured says nothing about the time of others."""
    if ran:
        return remaining.end()
    remaining.total -= 1
    return None


class Lines:
    """The same for a log file: a line for each phase that begins."""

    def __init__(self, jobs: list[Job], console: Console) -> None:
        self._console = console
        self._remaining = Remaining("engine", len(jobs))
        self._seen: dict[str, int] = {}
        self._start = time.monotonic()

    def watch(self, job: Job, events: list[dict[str, Any]]) -> None:
        if job.name not in self._seen:
            self._say(job.name, self._remaining.begin())
        for event in events[self._seen.get(job.name, 0) :]:
            self._say(job.name, event["phase"] if event["cell"] is None else f"{event['cell']}: {event['phase']}")
        self._seen[job.name] = len(events)

    def done(self, result: EngineResult) -> None:
        self._say(result.name, outcome(result))
        if left := _left(self._remaining, result.name in self._seen):
            self._say("all", left)

    def _say(self, name: str, text: str) -> None:
        self._console.out(f"{time.monotonic() - self._start:7.1f} s  {name}: {text}", highlight=False)


def outcome(result: EngineResult) -> str:
    """One line on an engine that has ended."""
    speeds = ", ".join(f"{cell.name} {cell.tokens_per_second:,.0f}" for cell in result.cells if cell.tokens_per_second)
    parts = [f"{speeds} tokens/s"] if speeds else []
    if result.status != "ok":
        parts = [f"{result.status}: {result.reason} (log: {result.log})", *(f"until then {part}" for part in parts)]
    return "; ".join([*parts, *(f"{cell.name} {cell.skipped}" for cell in result.cells if cell.skipped)])


@contextmanager
def board(jobs: list[Job], console: Console) -> Iterator[Board | Lines]:
    if not console.is_terminal:
        yield Lines(jobs, console)
        return
    what = TextColumn("{task.fields[what]}")
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TimeElapsedColumn(), what)
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        yield Board(jobs, progress)


def show(report: Report, console: Console) -> None:
    """A table for each cell with a row per engine: many engines side by side have no room."""
    for cell, row in entries(report):
        table = Table(title=f"{report.settings['shape']}, {cell}")
        table.add_column("", no_wrap=True)
        for heading in ("tokens per second", "over plain", "over a draft model"):
            table.add_column(heading, justify="right")
        for engine, entry in zip(report.engines, row, strict=True):
            ratios = (f"{r:.2f}x" if r is not None else "" for r in (entry.over_plain, entry.over_draft))
            table.add_row(escape(title(engine)), entry.speed_text, *ratios, style="red" if entry.losing else "")
        console.print(table)
    console.print(escape(caption(report)), highlight=False)
    for remark in remarks(report):
        console.print(escape(remark))
