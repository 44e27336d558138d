"""A calibration as a picture: how alike layers are, with the map through it, and what reading less costs each."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from specattn_vllm.tools.outputs import write_whole

SIMILARITIES = {
    "retained": "target's attention on what the draft layer chooses",
    "kl": "similarity, minus KL in nats",
}
COSTS = {"kl": "KL of the output, this layer alone pruned (nats)", "mass": "attention mass that is kept"}


def draw(found: dict[str, Any]) -> Figure:
    """found: a calibrated map as it stands in its file."""
    told = found["provenance"]
    curves = told.get("curves", {})
    names = [name for name in COSTS if name in curves]
    figure = Figure(figsize=(5 + 4.5 * len(names), 4.5))
    axes = figure.subplots(1, 1 + len(names), squeeze=False)
    _similarity(axes[0, 0], told["similarity"], found["layers"], told["settings"]["similarity"])
    for place, name in zip(axes[0, 1:], names, strict=True):
        _curves(place, curves, name)
    figure.tight_layout()
    return figure


def _similarity(axes: Axes, values: list[list[float]], layers: list[int | None], kind: str) -> None:
    image = axes.imshow(values, aspect="auto", cmap="viridis", origin="lower")
    mapped = [(i, j) for j, i in enumerate(layers) if i is not None]
    axes.plot(*zip(*mapped, strict=True), color="white", marker="o", markersize=4, linewidth=1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("draft layer")
    axes.set_ylabel("target layer")
    axes.set_title(SIMILARITIES.get(kind, f"similarity, {kind}"), fontsize=10)
    axes.figure.colorbar(image, ax=axes)


def _curves(axes: Axes, curves: dict[str, Any], name: str) -> None:
    rows = [(j, x, y) for j, (x, y) in enumerate(zip(curves["read"], curves[name], strict=True)) if y is not None]
    colours = colormaps["plasma"]
    for j, x, y in rows:
        # Seven names are as many as can be told apart; the colours go from the first layer to the last.
        label = f"layer {j}" if j % max(1, len(curves[name]) // 7) == 0 else None
        axes.plot(x, y, color=colours(j / max(1, len(curves[name]))), linewidth=1, marker=".", label=label)
    axes.set_xscale("log")
    axes.set_xticks([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0])
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_minor_locator(NullLocator())
    if name == "kl":
        axes.set_yscale("log")
    axes.set_xlabel("share of the context that is read")
    axes.set_title(COSTS[name], fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)


def save(found: dict[str, Any], path: Path) -> None:
    """As PNG; raises UserError if it cannot be written."""
    content = io.BytesIO()
    draw(found).savefig(content, dpi=160, format="png")
    write_whole(path, content.getvalue())
