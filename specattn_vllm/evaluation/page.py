"""`specattn report`: reports of `specattn eval methods` as one HTML page, which loads nothing from anywhere."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specattn_vllm.installed import UserError, require
from specattn_vllm.tools.outputs import output_file

if TYPE_CHECKING:
    from specattn_vllm.evaluation.results import Report, SettingResult


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
    from specattn_vllm.evaluation import columns, pictures
    from specattn_vllm.evaluation import report as tables
    from specattn_vllm.evaluation.figures import rows_of

    found = rows_of(report)
    shown, cells = columns.table(found)
    # Whether the output is the target's own is what a reader of a figure has to know first: beside the name.
    order = sorted(range(len(shown)), key=lambda n: (n > 0, shown[n].heading != "lossless"))
    shown, cells = [shown[n] for n in order], [[row[n] for n in order] for row in cells]
    return {
        "name": name,
        "caption": tables.caption(report),
        "charts": pictures.charts(found),
        "headings": [column.short for column in shown],
        "rows": [(_told(result), of) for (result, _), of in zip(found, cells, strict=True)],
        "differences": [(other.name, *_differences(report, other)) for other in report.results],
        "sureness": columns.sureness(len(report.setup["documents"])),
        "kept": [_kept(result) for result in report.results if result.kept is not None],
        "provenance": _provenance(report),
        "documents": report.setup["documents"],
        "setup": {key: value for key, value in report.setup.items() if key != "documents"},
    }


def _told(result: SettingResult) -> dict[str, Any]:
    """What a setting is, beyond its name."""
    if result.other_batches:
        return {**result.options, "other_batches": True}
    return result.options if result.peer is None else result.peer.model_dump(exclude_none=True)


def _differences(
    report: Report, other: SettingResult
) -> tuple[list[str], list[tuple[str, str, list[tuple[str, bool]]]]]:
    """Headings, and of each other setting its name, whether it is lossless, and its cells."""
    from specattn_vllm.evaluation import columns
    from specattn_vllm.evaluation.figures import difference

    results = [result for result in report.results if result is not other]
    documents = len(report.setup["documents"])
    headings, cells = columns.differences([difference(result, other) for result in results], documents)
    named = zip(results, cells, strict=True)
    return headings, [(result.name, "yes" if result.lossless else "no", of) for result, of in named]


def _kept(result: SettingResult) -> dict[str, Any]:
    from specattn_vllm.evaluation.pictures import heat_map

    kept = result.kept
    number = {name: re.sub(r".*\blayers\.(\d+)\b.*", r"\1", name) for name in kept.layers}
    return {
        "name": result.name,
        "rounds": len(kept.contexts),
        "bucket": kept.bucket,
        "layers": [(number[name], kept.shares[name], heat_map(kept.percentages(name))) for name in kept.layers],
    }


def _provenance(report: Report) -> list[tuple[dict[str, Any], list[str]]]:
    """Each run of the command with the settings that it measured; a report may be gone on with."""
    runs: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for result in report.results:
        source = result.provenance or report.provenance
        runs.setdefault(json.dumps(source, sort_keys=True), (source, []))[1].append(result.name)
    return list(runs.values())
