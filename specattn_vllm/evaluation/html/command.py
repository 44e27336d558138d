"""`specattn report`: reports of evaluations and of speed as one HTML page, which loads nothing from anywhere."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from specattn_vllm import data_file
from specattn_vllm.evaluation import results
from specattn_vllm.installed import UserError, require
from specattn_vllm.tools import outputs

TITLES = {
    "quality": "What pruning costs in quality",
    "speed": "How fast it decodes",
    "serving": "How servers answer under load",
}
"""By what a section is about, which is its template's name too."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    told = "reports of `specattn eval methods`, `specattn bench engines` and `specattn bench serve`"
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json", help=told)
    parser.add_argument(
        "--out",
        type=outputs.output_file,
        default=Path("specattn-report.html"),
        metavar="FILE.html",
        help="[%(default)s]",
    )


def run(args: argparse.Namespace) -> None:
    require(("jinja2", "numpy", "matplotlib"))
    text = render([section(path) for path in args.files])
    outputs.write_whole(args.out, text)
    print(args.out)


def section(path: Path) -> dict[str, Any]:
    """What its template shows of a file: a section for each, because what they measured need not be comparable."""
    from specattn_vllm.bench import schema
    from specattn_vllm.bench.serve.schema import ServeReport
    from specattn_vllm.causes import of_file
    from specattn_vllm.evaluation.html import quality, serving, speed

    try:
        given = data_file.parse(data_file.read(path, outputs.LARGEST))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be shown: {of_file(error)}") from None
    kind = given.get("kind") if isinstance(given, dict) else None
    servers = ServeReport.model_fields["kind"].default
    with outputs.shown(path):
        if kind == results.KIND:
            return quality.section(path.name, results.read(path))
        if kind == schema.KIND:
            return speed.section(path.name, outputs.read(path, "specattn bench", schema.Report))
        if kind == servers:
            return serving.section(path.name, outputs.read(path, "specattn bench serve", ServeReport))
    raise UserError(
        f"{path} cannot be shown: its kind is {json.dumps(kind)}; the page takes reports of `{results.COMMAND}` "
        f"({json.dumps(results.KIND)}), `{schema.COMMAND}` ({json.dumps(schema.KIND)}) and `specattn bench serve` "
        f"({json.dumps(servers)})"
    )


def render(sections: list[dict[str, Any]]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("specattn_vllm.evaluation.html"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    about = [name for name in TITLES if any(section["about"] == name for section in sections)]
    title = ", and ".join(TITLES[name] if not place else TITLES[name].lower() for place, name in enumerate(about))
    return environment.get_template("report.html.jinja").render(sections=sections, about=about, title=title)
