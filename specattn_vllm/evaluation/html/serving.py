"""A report of servers under load as a section of the page."""

from __future__ import annotations

from typing import Any

from specattn_vllm.bench.report import title
from specattn_vllm.bench.serve.report import caption, remarks, rows
from specattn_vllm.bench.serve.schema import ServeReport
from specattn_vllm.tools.provenance import different


def section(name: str, report: ServeReport) -> dict[str, Any]:
    """The table, a row for each rate and figure; a cell that loses ends with †."""
    return {
        "about": "serving",
        "name": name,
        "caption": caption(report),
        "remarks": remarks(report),
        "headings": ["requests/s", "figure", *(title(engine) for engine in report.engines)],
        "rows": [(rate, figure, [("†" in text, text) for text in cells]) for rate, figure, *cells in rows(report)],
        "settings": report.settings,
        "provenance": different((title(engine), engine.provenance or report.provenance) for engine in report.engines),
    }
