"""`specattn report`: reports of `specattn eval methods` as one HTML page, which loads nothing from anywhere."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specattn_vllm.bench.command import require
from specattn_vllm.installed import UserError

if TYPE_CHECKING:
    from specattn_vllm.evaluation.charts import Chart
    from specattn_vllm.evaluation.report import Figures, Mean
    from specattn_vllm.evaluation.schema import Report, SettingResult

SURE = 1.96
"""Standard errors in half of a 95% interval."""
# Over the cells of `report.row`, in less room.
HEADINGS = (
    "method", "KV read by the target", "by the draft", "KL to dense", "same favourite", "perplexity change (95%)",
    "acceptance", "lossless",
)  # fmt: skip
# Fields of `report.Difference`: heading and form.
DIFFERENCES = (("kl", "KL", "+.4f"), ("agreement", "same favourite", "+.2%"), ("nll", "loss (nats a token)", "+.4f"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json", help="reports of `specattn eval methods`")
    parser.add_argument(
        "--out", type=Path, default=Path("specattn-report.html"), metavar="FILE.html", help="[%(default)s]"
    )


def run(args: argparse.Namespace) -> None:
    require(("jinja2",))
    from specattn_vllm.evaluation.report import read

    text = render([(path.name, read(path)) for path in args.files])
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {args.out}: {error.strerror}") from None
    print(args.out)


def render(reports: list[tuple[str, Report]]) -> str:
    """The page of reports by name, a section each: what they measured need not be comparable."""
    import jinja2

    from specattn_vllm.evaluation import charts

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("specattn_vllm.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "frame": {name: getattr(charts, name) for name in ("WIDTH", "HEIGHT", "LEFT", "RIGHT", "TOP", "BOTTOM")},
        "colours": charts.COLOURS,
        "headings": HEADINGS,
        "columns": DIFFERENCES,
        "is_sure": lambda found: found.error is not None and abs(found.value) > SURE * found.error,
    }
    sections = [_section(name, report) for name, report in reports]
    return environment.get_template("report.html.jinja").render(sections=sections)


def _section(name: str, report: Report) -> dict[str, Any]:
    from specattn_vllm.evaluation import report as tables

    found = [(result, tables.figures(result, report.dense)) for result in report.results]
    return {
        "name": name,
        "caption": tables.caption(report),
        "charts": _charts(found),
        "rows": [(_told(result), _cells(tables.row(result, figures), figures)) for result, figures in found],
        "differences": [
            (other.name, [(r.name, tables.difference(r, other)._asdict()) for r in report.results if r is not other])
            for other in report.results
        ],
        "kept": [_kept(result) for result in report.results if result.kept is not None],
        "provenance": _provenance(report),
        "documents": report.setup["documents"],
        "setup": {key: value for key, value in report.setup.items() if key != "documents"},
    }


def _told(result: SettingResult) -> dict[str, Any]:
    """What a setting is, beyond its name."""
    return result.options if result.peer is None else result.peer.model_dump(exclude_none=True)


def _cells(texts: list[str], found: Figures) -> list[tuple[str, float | str]]:
    """What stands in a row's cells, and what they are sorted by."""
    drafting = -1.0 if found.draft_kv_read is None else found.draft_kv_read
    figures = (
        found.kv_read, drafting, found.kl.value, found.agreement.value, found.perplexity_change,
        found.acceptance_length,
    )  # fmt: skip
    return list(zip(texts, (texts[0], *figures, texts[-1]), strict=True))


def _charts(rows: list[tuple[SettingResult, Figures]]) -> list[Chart]:
    """KV read against each figure, of the settings that change the target's output."""
    from specattn_vllm.evaluation.charts import Value, chart, family

    families: dict[str, list[tuple[str, Figures]]] = {}
    for result, found in rows:
        if not result.lossless:
            families.setdefault(family(result.name), []).append((result.name, found))
    if not families:
        return []

    def values(figure) -> dict[str, list[Value]]:
        return {
            name: [Value(setting, found.kv_read, *figure(found)) for setting, found in members]
            for name, members in families.items()
        }

    return [
        chart("KL to dense (nats)", values(lambda f: _with_interval(f.kl)), "{:.3g}".format, log=True),
        chart("perplexity change", values(lambda f: (f.perplexity_change, f.interval)), "{:+.1%}".format),
        chart("same favourite", values(lambda f: _with_interval(f.agreement)), "{:.1%}".format),
    ]


def _kept(result: SettingResult) -> dict[str, Any]:
    from specattn_vllm.evaluation.charts import heat_map

    kept = result.kept
    number = {name: re.sub(r".*\blayers\.(\d+)\b.*", r"\1", name) for name in kept.layers}
    return {
        "name": result.name,
        "rounds": len(kept.contexts),
        "bucket": kept.bucket,
        "layers": [(number[name], kept.shares[name], heat_map(kept.percentages(name))) for name in kept.layers],
    }


def _with_interval(found: Mean) -> tuple[float, tuple[float, float] | None]:
    if found.error is None:
        return found.value, None
    return found.value, (found.value - SURE * found.error, found.value + SURE * found.error)


def _provenance(report: Report) -> list[tuple[dict[str, Any], list[str]]]:
    """Each run of the command with the settings that it measured; a report may be gone on with."""
    runs: list[tuple[dict[str, Any], list[str]]] = []
    for result in report.results:
        source = result.provenance or report.provenance
        names = next((names for known, names in runs if known == source), None)
        if names is None:
            runs.append((source, [result.name]))
        else:
            names.append(result.name)
    return runs
