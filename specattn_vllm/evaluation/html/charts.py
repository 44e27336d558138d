"""Charts of an evaluation: bytes that are read against how far the target then is from full attention."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from specattn_vllm.evaluation.report import COLUMNS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from specattn_vllm.evaluation.results import Report

Families = dict[str, list[tuple[str, dict[str, Any]]]]
"""Names and figures of settings, by their family, the fewest bytes first."""

HEADINGS = {"kl": "KL to dense (nats)", "perplexity_change": "perplexity change", "agreement": "top-1 agreement"}

COLOURS = ("#0b62a8", "#b93d0c", "#15743a", "#7e22ce", "#6b5900", "#be185d", "#4b5563", "#0b7285")
"""Each stands out from white, 4.5:1 or more."""
MARKS = "os^DvPX"
"""Not as many as colours, and without a common divisor: that many times as many series differ."""

# The same report gives the same picture; text stays text.
STYLE = {"svg.hashsalt": "specattn", "svg.fonttype": "none", "font.size": 9}


def family(name: str) -> str:
    """What settings are called that differ in nothing but a size: the name without a percentage."""
    return re.sub(r" \d[\d.]*%(?= |,|$)", "", name)


def families(report: Report) -> Families:
    """The settings that change the target's output. Intervals are made anew, which takes a while."""
    from specattn_vllm.evaluation.figures import rows_of

    found: dict[str, list] = {}
    for result, figures in rows_of(report):
        if not result.lossless:
            found.setdefault(family(result.name), []).append((result.name, figures))
    return {label: sorted(members, key=lambda of: of[1]["bytes_read"]) for label, members in found.items()}


def look(number: int) -> dict[str, str]:
    """Colour and mark of a series; no two of the first 56 have both in common."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKS[number % len(MARKS)]}


def draw(drawn: Families, name: str) -> Figure:
    """One figure by bytes, with a point for each setting; those of one family are joined."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

    figure = Figure(figsize=(5.2, 3.7), layout="constrained")
    axes = figure.subplots()
    for number, members in enumerate(drawn.values()):
        x, y = [of["bytes_read"] for _, of in members], [of[name].value for _, of in members]
        ends = [of[name].interval or (of[name].value,) * 2 for _, of in members]
        bars = [[abs(at - end[side]) for at, end in zip(y, ends, strict=True)] for side in (0, 1)]
        axes.errorbar(x, y, bars, linewidth=1, elinewidth=0.8, capsize=2, markersize=5, **look(number))
    if name == "kl":
        axes.set_yscale("log", nonpositive="clip")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(xlabel="bytes of KV read by the target, what is searched included", ylabel=HEADINGS[name])
    axes.set_xlim(0, 1.1 * max(of["bytes_read"] for members in drawn.values() for _, of in members))
    axes.grid(alpha=0.3)
    return figure


def alternative(drawn: Families, name: str) -> str:
    """What the chart shows, for those who do not see it."""
    form = COLUMNS[name][1]
    points = [
        f"{setting} {format(of[name].value, form)} at {of['bytes_read']:.1%}"
        for members in drawn.values()
        for setting, of in members
    ]
    return f"{HEADINGS[name]} by bytes of KV read: {'; '.join(points)}"


def charts(drawn: Families) -> list[dict[str, str]]:
    """A chart for each figure, as data URL and as text; none of nothing."""
    return [_picture(partial(draw, drawn, name), alternative(drawn, name)) for name in HEADINGS] if drawn else []


def legend(drawn: Families) -> list[dict[str, str]]:
    """Of all charts: names are the page's own text, which may be long and then goes on in another line."""
    return [_picture(partial(swatch, number), name) for number, name in enumerate(drawn)]


def swatch(number: int) -> Figure:
    """The line and mark of a series."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.45, 0.18))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.plot([0, 1, 2], [0, 0, 0], linewidth=1, markersize=5, markevery=[1], **look(number))
    axes.set_axis_off()
    return figure


def _picture(make: Callable[[], Figure], text: str) -> dict[str, str]:
    import matplotlib

    written = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        make().savefig(written, format="svg", transparent=True, metadata={"Date": None})
    address = "data:image/svg+xml;base64," + base64.b64encode(written.getvalue()).decode()
    return {"address": address, "text": text}
