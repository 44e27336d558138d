"""Draws README's chart from docs/results: python scripts/pages/readme_chart.py [--out FILE.svg]."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "docs" / "results" / "h200-sketch-engine.json"
CELLS = ("1x4k", "16x4k", "4x32k", "16x32k", "4x128k")
SERIES = {
    "plain": ("stock vLLM", "#8c8c8c"),
    "eagle, 2.5 a round": ("stock vLLM, EAGLE-3 head", "#c28e0e"),
    "sketch-eagle 8%, 2.5 a round": ("sketch, EAGLE-3 head", "#2a78d6"),
    "sketch 8%": ("sketch, 1B draft model", "#1b9e77"),
}
"""Engine of the report -> its name in the chart, and a colour that can be seen on white and on black."""
INK = "#808080"


def speeds() -> dict[str, dict[str, float]]:
    """Engine -> cell -> decoded tokens per second."""
    engines = json.loads(MEASURED.read_text())["engines"]
    return {e["name"]: {c["name"]: c["tokens_per_second"] for c in e["cells"]} for e in engines}


def draw() -> Figure:
    found = speeds()
    figure = Figure(figsize=(8.5, 3.2), layout="constrained")
    axes, width = figure.subplots(), 0.84 / len(SERIES)
    for index, (engine, (name, colour)) in enumerate(SERIES.items()):
        shown = [(place, found[engine].get(cell)) for place, cell in enumerate(CELLS)]
        for place in (place for place, speed in shown if not speed):
            at = place - 0.42 + (index + 0.5) * width
            axes.text(at, 40, "not measured", rotation=90, ha="center", va="bottom", fontsize=7, color=INK)
        shown = [(place, speed) for place, speed in shown if speed]
        places = [place - 0.42 + (index + 0.5) * width for place, _ in shown]
        bars = axes.bar(places, [speed for _, speed in shown], 0.92 * width, color=colour, label=name)
        axes.bar_label(bars, [f"{speed:,.0f}" for _, speed in shown], fontsize=8, padding=2, color=INK)
    axes.set_xticks(range(len(CELLS)), [f"{cell.replace('x', ' x ')}" for cell in CELLS])
    axes.set(xlabel="requests x context", ylabel="decoded tokens/s")
    axes.margins(y=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_color(INK)
    axes.legend(fontsize=9, frameon=False, labelcolor=INK, ncols=2)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "speed.svg")
    # Text stays text, and the same figures give the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "specattn", "font.family": "sans-serif"})
    draw().savefig(parser.parse_args().out, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
