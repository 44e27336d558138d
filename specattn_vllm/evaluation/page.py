"""`specattn report`: reports of evaluations and of speed as one HTML page, which loads nothing from anywhere."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specattn_vllm.evaluation import results
from specattn_vllm.installed import UserError, require
from specattn_vllm.tools.outputs import output_file

if TYPE_CHECKING:
    from specattn_vllm.evaluation.results import Report, SettingResult

TITLES = {"quality": "What pruning costs in quality", "speed": "How fast it decodes"}
"""By what a section is about, which is its template's name too."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    told = "reports of `specattn eval methods` and of `specattn bench engines`"
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json", help=told)
    parser.add_argument(
        "--out", type=output_file, default=Path("specattn-report.html"), metavar="FILE.html", help="[%(default)s]"
    )


def run(args: argparse.Namespace) -> None:
    require(("jinja2", "numpy", "matplotlib"))
    text = render([section(path) for path in args.files])
    try:
        args.out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {args.out}: {error.strerror}") from None
    print(args.out)


def section(path: Path) -> dict[str, Any]:
    """What its template shows of a file: a section for each, because what they measured need not be comparable."""
    from specattn_vllm.bench import page as speed
    from specattn_vllm.bench import schema

    try:
        given = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be shown: {error}") from None
    kind = given.get("kind") if isinstance(given, dict) else None
    if kind == results.KIND:
        return _quality(path.name, results.read(path))
    if kind == schema.KIND:
        return speed.section(path.name, schema.read(path))
    raise UserError(
        f"{path} cannot be shown: its kind is {json.dumps(kind)}; the page takes reports of `{results.COMMAND}` "
        f"({json.dumps(results.KIND)}) and of `{schema.COMMAND}` ({json.dumps(schema.KIND)})"
    )


def render(sections: list[dict[str, Any]]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("specattn_vllm.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    about = [name for name in TITLES if any(section["about"] == name for section in sections)]
    title = ", and ".join(TITLES[name] if not place else TITLES[name].lower() for place, name in enumerate(about))
    return environment.get_template("report.html.jinja").render(sections=sections, about=about, title=title)


def _quality(name: str, report: Report) -> dict[str, Any]:
    from specattn_vllm.evaluation import charts
    from specattn_vllm.evaluation import report as tables

    drawn = charts.families(report)
    # Whether the output is the target's own is what a reader of a figure has to know first: beside the name.
    headings, rows = tables.cells(report)
    headings, *rows = ([row[0], row[-1], *row[1:-1]] for row in (headings, *rows))
    return {
        "about": "quality",
        "name": name,
        "caption": tables.caption(report),
        "charts": charts.charts(drawn),
        "legend": charts.legend(drawn),
        "headings": headings,
        "rows": [(result.lossless, *row) for result, row in zip(report.results, rows, strict=True)],
        "options": {result.name: _told(result) for result in report.results},
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
    return result.baseline or result.options


def _provenance(report: Report) -> list[dict[str, Any]]:
    """Of each run of the command that measured a part of the report."""
    sources = [result.provenance or report.provenance for result in report.results]
    return list({json.dumps(source, sort_keys=True): source for source in sources}.values())
