"""`specattn report`: reports of `specattn eval methods` as one HTML page, which loads nothing from anywhere."""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specattn_vllm.installed import UserError, require
from specattn_vllm.tools.outputs import output_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from specattn_vllm.evaluation.results import Report, SettingResult


MARKS = "os^"
HEADINGS = {"kl": "KL to dense (nats)", "perplexity_change": "perplexity change", "agreement": "top-1 agreement"}
# The same report gives the same picture; text stays text.
STYLE = {"svg.hashsalt": "specattn", "svg.fonttype": "none"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json", help="reports of `specattn eval methods`")
    parser.add_argument(
        "--out", type=output_file, default=Path("specattn-report.html"), metavar="FILE.html", help="[%(default)s]"
    )


def run(args: argparse.Namespace) -> None:
    require(("jinja2", "numpy", "matplotlib"))
    from specattn_vllm.evaluation.results import read

    text = render([(path.name, read(path)) for path in args.files])
    try:
        args.out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {args.out}: {error.strerror}") from None
    print(args.out)


def render(reports: list[tuple[str, Report]]) -> str:
    """The page of reports by name, a section each: what they measured need not be comparable."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("specattn_vllm.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = [_section(name, report) for name, report in reports]
    return environment.get_template("report.html.jinja").render(sections=sections)


def _section(name: str, report: Report) -> dict[str, Any]:
    from specattn_vllm.evaluation import report as tables

    # Whether the output is the target's own is what a reader of a figure has to know first: beside the name.
    headings, rows = tables.cells(report)
    headings, *rows = ([row[0], row[-1], *row[1:-1]] for row in (headings, *rows))
    return {
        "name": name,
        "caption": tables.caption(report),
        "charts": charts(report),
        "headings": headings,
        "rows": [(_told(result), row) for result, row in zip(report.results, rows, strict=True)],
        "difference_headings": ["method", "lossless", *(heading for heading, _ in tables.DIFFERENCES.values())],
        "differences": [
            (other.name, [(of.name, tables.yes_or_no(of), more) for of, more in tables.compared(report, other)])
            for other in report.results
        ],
        "sureness": tables.sureness(report),
        "provenance": _provenance(report),
        "documents": report.setup["documents"],
        "setup": {key: value for key, value in report.setup.items() if key != "documents"},
    }


def _told(result: SettingResult) -> dict[str, Any]:
    """What a setting is, beyond its name."""
    if result.other_batches:
        return {**result.options, "other_batches": True}
    return result.peer or result.options


def _provenance(report: Report) -> list[dict[str, Any]]:
    """Of each run of the command that measured a part of the report."""
    sources = [result.provenance or report.provenance for result in report.results]
    return list({json.dumps(source, sort_keys=True): source for source in sources}.values())


def family(name: str) -> str:
    """What settings are called that differ in nothing but a size: the name without a percentage."""
    return re.sub(r" \d[\d.]*%(?= |,|$)", "", name)


def draw(report: Report) -> Figure | None:
    """The bytes that are read against how far the target then is from full attention: a chart for each figure, with a
    point for each setting that changes the target's output; those of one family are joined. None without any."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    from specattn_vllm.evaluation.figures import rows_of

    families: dict[str, list] = {}
    for result, found in rows_of(report):
        if not result.lossless:
            families.setdefault(family(result.name), []).append(found)
    if not families:
        return None
    figure = Figure(figsize=(3.5 + 5.5 * len(HEADINGS), 4.5), layout="constrained")
    charts = figure.subplots(1, len(HEADINGS))
    for axes, (name, heading) in zip(charts, HEADINGS.items(), strict=True):
        for number, (label, members) in enumerate(families.items()):
            members.sort(key=lambda found: found["bytes_read"])
            x, y = [found["bytes_read"] for found in members], [found[name].value for found in members]
            ends = [found[name].interval or (found[name].value,) * 2 for found in members]
            bars = [[abs(at - end[side]) for at, end in zip(y, ends, strict=True)] for side in (0, 1)]
            look = {"color": f"C{number % 10}", "marker": MARKS[number // 10 % len(MARKS)]}
            axes.errorbar(x, y, bars, linewidth=1, markersize=5, label=label, **look)
        if name == "kl":
            axes.set_yscale("log", nonpositive="clip")
        else:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set(xlim=(0, 1), xlabel="bytes of KV read by the target, what is searched included", ylabel=heading)
        axes.grid(alpha=0.3)
    figure.legend(*charts[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    return figure


def charts(report: Report) -> str | None:
    """As a data URL."""
    import matplotlib

    figure, text = draw(report), io.BytesIO()
    if figure is None:
        return None
    with matplotlib.rc_context(STYLE):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(text.getvalue()).decode()
