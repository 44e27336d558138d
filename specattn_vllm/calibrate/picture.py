"""Draws a calibration: the similarity of layers as an image, with the map as a line through it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from specattn_vllm.tools.outputs import write_whole


def draw(found: dict[str, Any]) -> Figure:
    """found: a calibrated map, as in its file."""
    figure = Figure(figsize=(5, 4.5))
    axes = figure.subplots()
    image = axes.imshow(found["provenance"]["similarity"], aspect="auto", cmap="viridis", origin="lower")
    mapped = [(i, j) for j, i in enumerate(found["layers"]) if i is not None]
    axes.plot(*zip(*mapped, strict=True), color="white", marker="o", markersize=4, linewidth=1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("draft layer")
    axes.set_ylabel("target layer")
    axes.set_title("similarity, minus KL in nats", fontsize=10)
    figure.colorbar(image, ax=axes)
    figure.tight_layout()
    return figure


def save(found: dict[str, Any], path: Path) -> None:
    """Save the drawing as PNG. Raises UserError if the file cannot be written."""
    content = io.BytesIO()
    draw(found).savefig(content, dpi=160, format="png")
    write_whole(path, content.getvalue())
