"""A report of speed as a section of the page."""

from __future__ import annotations

from typing import Any

from specattn_vllm.bench.grid import Cell
from specattn_vllm.bench.report import LOSING, Entry, caption, entries, name_of, remarks, title
from specattn_vllm.bench.schema import EngineResult, Report
from specattn_vllm.tools.provenance import different


def section(name: str, report: Report) -> dict[str, Any]:
    """The table, and bars for each cell; `losing` says that nobody should switch there."""
    rows = entries(report)
    return {
        "about": "speed",
        "name": name,
        "caption": caption(report),
        "remarks": remarks(report),
        "losing_share": f"{LOSING:g}",
        "compared": any(not engine.job.ours for engine in report.engines),
        "lost": _lost(report, rows),
        "headings": [title(engine) for engine in report.engines],
        "rows": [(name_of(cell), [(entry.losing, entry.text) for entry in row]) for cell, row in rows],
        "cells": [(name_of(cell), _bars(report.engines, row)) for cell, row in rows],
        "settings": report.settings,
        "provenance": different((title(engine), engine.provenance or report.provenance) for engine in report.engines),
    }


def _lost(report: Report, rows: list[tuple[Cell, list[Entry]]]) -> list[str]:
    """Engines of ours, with the cells in which they lose."""
    lost = []
    for place, engine in enumerate(report.engines):
        if cells := [name_of(cell) for cell, row in rows if row[place].losing]:
            lost.append(f"{title(engine)}: {', '.join(cells)}")
    return lost


def _bars(engines: list[EngineResult], row: list[Entry]) -> list[dict[str, Any]]:
    """As long as the speed is, the fastest of the cell 100%."""
    fastest = max((entry.speed or 0 for entry in row), default=0)
    return [
        {
            "name": title(engine),
            "kind": "losing" if entry.losing else "ours" if engine.job.ours else "stock",
            "percent": None if entry.speed is None else round(100 * entry.speed / fastest, 1),
            "text": entry.text,
            "why": entry.result.skipped if entry.result else None,
        }
        for engine, entry in zip(engines, row, strict=True)
    ]
