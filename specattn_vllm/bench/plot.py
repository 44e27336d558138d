"""The report as a picture: for each cell, the speed of every engine as a multiple of plain decoding's."""

from __future__ import annotations

from matplotlib.figure import Figure

from specattn_vllm.bench.report import entries, title
from specattn_vllm.bench.schema import Report
from specattn_vllm.tools.provenance import machine


def draw(report: Report) -> Figure:
    """Bars by cell, tokens per second above them; without plain decoding in every cell they are as high as that."""
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
