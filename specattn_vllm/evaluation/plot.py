"""The report as a picture: the bytes that are read against how far the target then is from full attention."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, whatever the machine shows
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from specattn_vllm.evaluation.charts import family
from specattn_vllm.evaluation.figures import rows_of
from specattn_vllm.evaluation.results import Report

MARKS = "osD^vPX*"


def draw(report: Report) -> Figure:
    """A point for each approximate setting; those of one family are joined."""
    families: dict[str, list] = {}
    for result, found in rows_of(report):
        if not result.lossless and found.bytes_read is not None:
            families.setdefault(family(result.name), []).append(found)
    figure, axes = plt.subplots(figsize=(9.5, 4.5), layout="constrained")
    for index, (name, members) in enumerate(families.items()):
        members.sort(key=lambda found: found.bytes_read)
        x, y = [found.bytes_read for found in members], [found.kl.value for found in members]
        axes.plot(x, y, marker=MARKS[index % len(MARKS)], linewidth=1, label=name)
    axes.set_yscale("log")
    axes.set_ylim(top=2 * max((found.kl.value for members in families.values() for found in members), default=1.0))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("bytes of KV read by the target, what is searched included")
    axes.set_ylabel("KL to dense (nats)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def save(report: Report, path: Path) -> None:
    figure = draw(report)
    figure.savefig(path, dpi=160)
    plt.close(figure)
