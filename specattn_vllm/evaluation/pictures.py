"""The report as pictures: the bytes that are read against how far the target then is from full attention, and what was
kept as heat maps."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import PercentFormatter

from specattn_vllm.evaluation.columns import Row
from specattn_vllm.evaluation.figures import rows_of
from specattn_vllm.evaluation.results import Report

MARKS = "osD^vPX*"
"""For the variants of one method, which share its colour."""
LINES = ("-", "--", ":", "-.")
HEADINGS = {"kl": "KL to dense (nats)", "perplexity_change": "perplexity change", "agreement": "top-1 agreement"}
PER_CENT = ("perplexity_change", "agreement")
# The same report gives the same picture; text stays text.
STYLE = {"svg.hashsalt": "specattn", "svg.fonttype": "none"}


def family(name: str) -> str:
    """What settings are called that differ in nothing but a size: the name without a percentage or top-p's number."""
    return re.sub(r" (\d[\d.]*%|(?<=top-p )\d[\d.]*)(?= |,|$)", "", name)


def looks_of(families: Sequence[str]) -> dict[str, dict[str, str]]:
    """A colour for each method, a mark and a line for each of its variants: colours alone would not tell twenty apart,
    and marks alone would not group them."""
    methods = list(dict.fromkeys(name.split(",")[0] for name in families))
    taken: dict[int, int] = {}
    looks = {}
    for name in families:
        colour = methods.index(name.split(",")[0]) % 10
        variant = taken[colour] = taken.get(colour, -1) + 1
        mark, line = MARKS[variant % len(MARKS)], LINES[variant % len(LINES)]
        looks[name] = {"color": f"C{colour}", "marker": mark, "linestyle": line}
    return looks


def draw(rows: list[Row], *names: str) -> Figure | None:
    """A chart for each figure by name, with a point for each setting that changes the target's output and whose bytes
    are known; those of one family are joined. None without any."""
    families: dict[str, list] = {}
    for result, found in rows:
        if not result.lossless and found.bytes_read is not None:
            families.setdefault(family(result.name), []).append(found)
    if not families:
        return None
    looks = looks_of(list(families))
    figure = Figure(figsize=(3.5 + 5.5 * len(names), 4.5), layout="constrained")
    charts = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(charts, names, strict=True):
        for label, members in families.items():
            members.sort(key=lambda found: found.bytes_read)
            points = [(found.bytes_read, getattr(found, name)) for found in members]
            x, y = [at for at, _ in points], [estimate.value for _, estimate in points]
            axes.plot(x, y, linewidth=1, markersize=5, label=label, **looks[label])
            ends = [(at, *estimate.interval) for at, estimate in points if estimate.interval is not None]
            if ends:
                axes.vlines(*zip(*ends, strict=True), color=looks[label]["color"], linewidth=1, alpha=0.5)
        if name in PER_CENT:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        else:
            axes.set_yscale("log", nonpositive="clip")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlim(0, 1)
        axes.set_xlabel("bytes of KV read by the target, what is searched included")
        axes.set_ylabel(HEADINGS[name])
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*charts[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    return figure


def save(report: Report, path: Path) -> None:
    """Nothing but axes where there is nothing to show."""
    (draw(rows_of(report), "kl") or Figure()).savefig(path, dpi=160)


def charts(rows: list[Row]) -> str | None:
    """All figures side by side, as a data URL."""
    figure, text = draw(rows, *HEADINGS), io.BytesIO()
    if figure is None:
        return None
    with matplotlib.rc_context(STYLE):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(text.getvalue()).decode()


def heat_map(rows: Sequence[Sequence[int]]) -> str:
    """A picture of percentages [rows][columns], a pixel each and white where nothing is, as a data URL."""
    image = io.BytesIO()
    imsave(image, np.array(rows), cmap="BuPu", vmin=0, vmax=100, format="png", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(image.getvalue()).decode()
