"""The benchmark on a terminal: what runs just now, and the table at the end, which is turned where it is too wide."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from specattn_vllm.bench.report import Entry, caption, entries, remarks, title
from specattn_vllm.bench.schema import EngineResult, Job, Report
from specattn_vllm.tools.remaining import Remaining

PHASES_PER_CELL = 3  # prefill, warm-up, measure
UNBOUNDED = 10_000


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


def table(report: Report) -> Table:
    found = Table(title=f"{report.settings['shape']}: tokens per second")
    found.add_column("requests x context", no_wrap=True)
    for engine in report.engines:
        found.add_column(title(engine), justify="right")
    for cell, row in entries(report):
        texts = [f"[red]{escape(entry.text)}[/]" if entry.losing else escape(entry.text) for entry in row]
        found.add_row(str(cell), *texts)
    return found


def turned(report: Report) -> list[Table]:
    """The same as a table for each cell with a row per engine, for terminals where the columns have no room."""
    found = []
    for cell, row in entries(report):
        part = Table(title=f"{report.settings['shape']}, {cell}")
        part.add_column("", no_wrap=True)
        for heading in ("tokens per second", "over plain", "over a draft model"):
            part.add_column(heading, justify="right")
        for engine, entry in zip(report.engines, row, strict=True):
            part.add_row(escape(title(engine)), *_figures(entry), style="red" if entry.losing else "")
        found.append(part)
    return found


def _figures(entry: Entry) -> tuple[str, str, str]:
    ratios = (f"{ratio:.2f}x" if ratio is not None else "" for ratio in (entry.over_plain, entry.over_draft))
    return entry.speed_text, *ratios


def show(report: Report, console: Console) -> None:
    whole = table(report)
    wanted = console.measure(whole, options=console.options.update(width=UNBOUNDED)).maximum
    if wanted <= console.width:
        console.print(whole)
    else:
        for part in turned(report):
            console.print(part)
    console.print(escape(caption(report)), highlight=False)
    for remark in remarks(report):
        console.print(escape(remark))
