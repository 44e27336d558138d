"""A report of quality as a section of the page."""

from __future__ import annotations

from typing import Any

from specattn_vllm.evaluation import report as tables
from specattn_vllm.evaluation.html import charts
from specattn_vllm.evaluation.results import Report, SettingResult
from specattn_vllm.tools.provenance import different


def section(name: str, report: Report) -> dict[str, Any]:
    """Its charts, its table, and the differences of each two settings."""
    drawn = charts.families(report)
    # Whether the output is the target's own is what a reader of a figure has to know first: beside the name.
    headings, rows = tables.cells(report)
    headings, *rows = ([row[0], row[-1], *row[1:-1]] for row in (headings, *rows))
    return {
        "about": "quality",
        "name": name,
        "caption": tables.caption(report),
        "charts": charts.charts(drawn),
        "legend": charts.legend(drawn),
        "headings": headings,
        "rows": [(result.lossless, *row) for result, row in zip(report.results, rows, strict=True)],
        "options": {result.name: _told(result) for result in report.results},
        "difference_headings": ["method", "lossless", *(heading for heading, _ in tables.DIFFERENCES.values())],
        "differences": [
            (other.name, [(of.name, tables.yes_or_no(of), more) for of, more in tables.compared(report, other)])
            for other in report.results
        ],
        "sureness": tables.sureness(report),
        "provenance": different((result.name, result.provenance or report.provenance) for result in report.results),
        "documents": report.setup["documents"],
        "setup": {key: value for key, value in report.setup.items() if key != "documents"},
    }


def _told(result: SettingResult) -> dict[str, Any]:
    """What a setting is, beyond its name."""
    more = {name: True for name in ("other_batches", "fp8_cache") if getattr(result, name)}
    return {**(result.baseline or result.options), **more}
