"""The report as a table in Markdown, and as a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from specattn_vllm.bench.grid import Cell, context_name
from specattn_vllm.bench.jobs import MODES
from specattn_vllm.bench.schema import CellResult, EngineResult, Job, Report
from specattn_vllm.installed import UserError
from specattn_vllm.tools.outputs import document, write_whole
from specattn_vllm.tools.provenance import machine, where

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSING = 0.95
"""Below this share of the speed of plain decoding, or of stock speculation with the same drafter, a cell counts as
lost: nobody should switch there."""


class Entry(NamedTuple):
    """One cell of the table."""

    result: CellResult | None
    speed: float | None = None
    ratios: tuple[float | None, float | None] = (None, None)
    """Over plain decoding, and over stock speculation with the same drafter, our modes only; None where one side is
    missing, or is itself what would be compared with."""
    losing: bool = False

    @property
    def text(self) -> str:
        if self.speed is None:
            return "-"
        ratios = ", ".join(f"{ratio:.2f}x" for ratio in self.ratios if ratio is not None)
        marks = "†" * self.losing + "‡" * (not self.result.steady)
        return f"{self.speed:,.{0 if self.speed >= 100 else 1}f}" + (f" ({ratios})" if ratios else "") + marks


def name_of(cell: Cell) -> str:
    return f"{cell.batch} x {context_name(cell.context)}"


def title(engine: EngineResult) -> str:
    mode = engine.job.mode
    name = (MODES[mode].title if mode in MODES else mode) + engine.name.removeprefix(mode)
    return name if engine.status == "ok" else f"{name} ({engine.status})"


def entries(report: Report) -> list[tuple[Cell, list[Entry]]]:
    """Row by row, an entry per engine of the report."""
    rows = []
    for cell in report.cells:
        found = [(engine, next((of for of in engine.cells if of.name == str(cell)), None)) for engine in report.engines]
        stock = [(engine.job, of.tokens_per_second) for engine, of in found if of and not engine.job.ours]
        rows.append((cell, [_entry(engine.job, of, [each for each in stock if each[1]]) for engine, of in found]))
    return rows


def _entry(job: Job, result: CellResult | None, stock: list[tuple[Job, float]]) -> Entry:
    """`stock`: what stock vLLM reaches. Compared with plain decoding, and with the best of those with the same kind of
    drafter: the ones of the same acceptance, or all where there is none."""
    if result is None or result.tokens_per_second is None:
        return Entry(result)
    speed, plain = result.tokens_per_second, next((speed for of, speed in stock if of.mode == "plain"), None)
    alike = [
        (of.acceptance_length, speed)
        for of, speed in stock
        if of.drafter and job.drafter and (of.drafter == "{eagle}") == (job.drafter == "{eagle}")
    ]
    same = [speed for length, speed in alike if length == job.acceptance_length]
    draft = max(same or [speed for _, speed in alike], default=None)
    over_plain = speed / plain if plain and job.mode != "plain" else None
    over_draft = speed / draft if draft and job.ours else None
    return Entry(result, speed, (over_plain, over_draft), job.ours and speed < LOSING * max(plain or 0, draft or 0))


def remarks(report: Report) -> list[str]:
    """What a reader of the table has to know: marks that occur, and what is missing."""
    found = []
    all_entries = [entry for _, row in entries(report) for entry in row]
    if any(entry.losing for entry in all_entries):
        found.append(f"† slower than {LOSING:g} times the best of those.")
    if any(entry.result and entry.speed and not entry.result.steady for entry in all_entries):
        found.append("‡ not steady when it was measured (--max-warmups).")
    for engine in report.engines:
        drafted, length = engine.job.draft_tokens, engine.job.acceptance_length
        if drafted and (drafted != report.settings["draft_tokens"] or length not in _lengths(report.settings)):
            found.append(f"{engine.name}: {drafted} draft tokens, {length:g} tokens a round.")
        if engine.status != "ok":
            found.append(f"{engine.name}: {engine.status}, {engine.reason}.")
        found += [f"{engine.name}, {cell.name}: {cell.skipped}." for cell in engine.cells if cell.skipped]
    short = {
        (cell.name, cell.prompt_tokens)
        for engine in report.engines
        for cell in engine.cells
        if cell.prompt_tokens != Cell.parse(cell.name).context
    }
    found += [
        f"{name}: prompts of {tokens:,} tokens, to fit in the model's positions." for name, tokens in sorted(short)
    ]
    keys, sources = ("gpu", "cpu", "driver", "commit", "versions"), [of.provenance for of in report.engines]
    if len({str([source.get(key) for key in keys]) for source in sources if source}) > 1:
        found.append("Not all from one machine and commit: see the provenance of each engine.")
    return found


def _lengths(settings: dict[str, Any]) -> list[float]:
    """Acceptance lengths of all modes."""
    given = settings["acceptance_length"]
    return given if isinstance(given, list) else [given]


def caption(report: Report) -> str:
    settings = report.settings
    *some, last = (f"{length:g}" for length in _lengths(settings))
    several = f"{', '.join(some)} or {last}" if some else last
    rounds, lengths = "", _lengths(settings)
    # Engines with rounds of their own are told of in remarks.
    if any(engine.job.draft_tokens and engine.job.acceptance_length in lengths for engine in report.engines):
        rounds = f"{settings['draft_tokens']} draft tokens, {several} tokens a round on average by vLLM's synthetic "
        rounds += "acceptance. "
    return (
        "Decoded tokens per second of the whole batch (over plain decoding; ours: also over the better stock mode with "
        f"the same drafter). {rounds}{settings['shape_description']}; {where(report.provenance)}."
    )


def markdown(report: Report) -> str:
    """As documents hold it: table, caption, remarks."""
    headings = ["requests x context", *(title(engine) for engine in report.engines)]
    rows = [[name_of(cell), *(entry.text for entry in row)] for cell, row in entries(report)]
    return document(headings, rows, caption(report), *remarks(report))


def save(report: Report, path: Path) -> None:
    """Write the drawing as a whole or not at all, as what the name ends with: .png, .svg, .pdf. UserError if it cannot
    be."""
    drawn = io.BytesIO()
    try:
        draw(report).savefig(drawn, dpi=160, format=path.suffix[1:] or "png")
    except ValueError as error:  # matplotlib knows no such format
        raise UserError(f"--plot {path}: {error}") from None
    write_whole(path, drawn.getvalue())


def draw(report: Report) -> Figure:
    """Bars by cell, tokens per second above them; without plain decoding in every cell they are as high as that."""
    from matplotlib.figure import Figure

    rows = entries(report)
    plain = next((i for i, engine in enumerate(report.engines) if engine.job.mode == "plain"), None)
    relative = plain is not None and all(row[plain].speed for _, row in rows)
    figure = Figure(figsize=(max(6.0, 0.3 * len(rows) * len(report.engines) + 1.5), 4.5), layout="constrained")
    axes, width = figure.subplots(), 0.84 / len(report.engines)
    for index, engine in enumerate(report.engines):
        shown = [(place, row[index].speed, row) for place, (_, row) in enumerate(rows) if row[index].speed]
        bars = axes.bar(
            [place - 0.42 + (index + 0.5) * width for place, *_ in shown],
            [speed / row[plain].speed if relative else speed for _, speed, row in shown],
            0.94 * width,
            label=title(engine),
        )
        axes.bar_label(bars, [f"{speed:,.0f}" for _, speed, _ in shown], fontsize=7, rotation=90, padding=2)
    axes.set_xticks(range(len(rows)), [str(cell) for cell, _ in rows])
    axes.set(xlabel="requests x context", ylabel="speed, plain decoding = 1" if relative else "tokens per second")
    axes.set_title(
        f"{report.settings['shape']}, {machine(report.provenance)} (figures: tokens per second)", fontsize=10
    )
    axes.margins(y=0.18)
    figure.legend(fontsize=8, frameon=False, ncols=4, loc="outside lower center")
    return figure
