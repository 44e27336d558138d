"""The report as a picture: for each cell, the speed of every engine as a multiple of plain decoding's."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure

from specattn_vllm.bench.report import entries, title
from specattn_vllm.bench.schema import Report

STOCK_COLOURS = ("#4d4d4d", "#8c8c8c", "#bfbfbf")
OUR_COLOURS = ("#1b6ca8", "#2a9d8f", "#e9a03b", "#d1495b", "#7b5ea7", "#5c946e")


BARS_PER_ROW = 32  # more would make the figures above them unreadable on a page


def draw(report: Report) -> Figure:
    """Bars by cell; figures above them are tokens per second. Hatched: slower than the best stock mode."""
    rows = entries(report)
    plain = next((i for i, engine in enumerate(report.engines) if engine.job.mode == "plain"), None)
    relative = plain is not None and all(row[plain].speed for _, row in rows)
    per_row = max(1, BARS_PER_ROW // max(1, len(report.engines)))
    parts = [rows[start : start + per_row] for start in range(0, len(rows), per_row)] or [[]]
    bars = min(len(rows), per_row) * len(report.engines)
    size = (max(6.0, 0.3 * bars + 1.5), 3.2 * len(parts) + 1.0)
    figure = Figure(figsize=size)
    columns = figure.subplots(len(parts), sharey=True, squeeze=False)
    for axes, part in zip(columns[:, 0], parts, strict=True):
        _draw_cells(axes, report, part, plain if relative else None)
    axes.set_xlabel("requests x context")
    machine = report.provenance.get("gpu") or report.provenance.get("cpu") or ""
    columns[0, 0].set_title(f"{report.settings['shape']}, {machine} (figures: tokens per second)", fontsize=10)
    # Below the axes: within them there is no place that a tall bar cannot need.
    axes.legend(fontsize=8, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    figure.tight_layout()
    return figure


def _draw_cells(axes, report: Report, rows: list, plain: int | None) -> None:
    """One row of the picture; heights are multiples of engine `plain`'s, if given."""
    width = 0.84 / max(1, len(report.engines))
    stock, ours = cycle(STOCK_COLOURS), cycle(OUR_COLOURS)
    for index, engine in enumerate(report.engines):
        colour = next(ours if engine.job.ours else stock)
        label = title(engine)
        for place, (_, row) in enumerate(rows):
            entry = row[index]
            if entry.speed is None:
                continue
            height = entry.speed if plain is None else entry.speed / row[plain].speed
            x = place - 0.42 + (index + 0.5) * width
            hatch = "///" if entry.losing else None
            axes.bar(x, height, 0.94 * width, color=colour, edgecolor="white", hatch=hatch, label=label)
            label = None  # once in the legend
            axes.annotate(f"{entry.speed:,.0f}", (x, height), ha="center", va="bottom", fontsize=7, rotation=90,
                          xytext=(0, 2), textcoords="offset points")  # fmt: skip
    axes.set_xticks(range(len(rows)), [str(cell) for cell, _ in rows])
    axes.set_ylabel("tokens per second" if plain is None else "speed, plain decoding = 1")
    if plain is not None:
        axes.axhline(1.0, color="#4d4d4d", linewidth=0.8, linestyle=":")
    axes.margins(y=0.18)
    axes.spines[["top", "right"]].set_visible(False)


def save(report: Report, path: Path) -> None:
    draw(report).savefig(path, dpi=160, bbox_inches="tight")
