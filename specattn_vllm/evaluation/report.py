"""The tables of an evaluation: their cells, and as Markdown."""

from __future__ import annotations

from specattn_vllm.evaluation.figures import FEWEST, Estimate, difference, rows_of
from specattn_vllm.evaluation.results import Report, SettingResult
from specattn_vllm.installed import UserError
from specattn_vllm.tools.outputs import document
from specattn_vllm.tools.provenance import machine, where

# Figures: what they are called, and how they are written.
COLUMNS = {
    "kv_read": ("KV read by the target", ".1%"),
    "bytes_read": ("bytes read by the target", ".1%"),
    "draft_kv_read": ("KV read by the draft", ".1%"),
    "kl": ("KL to dense", "z.4f"),
    "kl_above_rounding": ("KL above rounding", "z.4f"),
    "agreement": ("top-1 agreement", ".1%"),
    "perplexity_change": ("perplexity change", "+z.2%"),
    "text_tokens": ("acceptance along the text", ".2f"),
    "text_greedy_tokens": ("the same, greedy", ".2f"),
    "acceptance_length": ("acceptance, free run", ".2f"),
}
COMPARED = ("kl", "kl_above_rounding", "agreement", "perplexity_change")
"""With the dense run, which has none of that itself."""
DIFFERENCES = {
    "kl": ("KL", "+z.4f"),
    "agreement": ("top-1 agreement", "+z.2%"),
    "nll": ("loss (nats a token)", "+z.4f"),
    "text_tokens": ("acceptance along the text", "+z.2f"),
    "text_greedy_tokens": ("the same, greedy", "+z.2f"),
    "acceptance_length": ("acceptance, free run", "+z.2f"),
}


def yes_or_no(result: SettingResult) -> str:
    return "yes" if result.lossless else "no"


def cells(report: Report) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row for each setting: its name, the figures, and whether it is lossless."""
    shown = [name for name in COLUMNS if name != "kl_above_rounding" or report.floor is not None]

    def cell(result: SettingResult, name: str, figure: float | Estimate) -> str:
        form = COLUMNS[name][1]
        if not isinstance(figure, Estimate):
            return format(figure, form)
        if result.is_reference and name in COMPARED:
            return "reference"
        return "floor" if result.other_batches and name == "kl_above_rounding" else figure.text(form)

    rows = [
        [result.name, *(cell(result, name, found[name]) for name in shown), yes_or_no(result)]
        for result, found in rows_of(report)
    ]
    return ["method", *(COLUMNS[name][0] for name in shown), "lossless"], rows


def markdown(report: Report) -> str:
    """Table and caption."""
    return document(*cells(report), caption(report))


def compared(report: Report, other: SettingResult) -> list[tuple[SettingResult, list[tuple[str, bool]]]]:
    """All other settings with how much more they have of `DIFFERENCES`, and whether that is sure, which takes `FEWEST`
    documents."""
    enough = len(report.setup["documents"]) >= FEWEST
    found = [(result, difference(result, other)) for result in report.results if result is not other]
    return [
        (result, [(more[name].text(form), enough and more[name].is_sure) for name, (_, form) in DIFFERENCES.items()])
        for result, more in found
    ]


def sureness(report: Report) -> str:
    """What a reader has to know of differences."""
    documents = len(report.setup["documents"])
    if documents >= FEWEST:
        return "Bold: 0 is not in it."
    few = f"{documents} document{'s' * (documents != 1)}"
    return (
        f"None is called sure of {few}: fewer than {FEWEST} may all lie on one side by chance, and their intervals are "
        "too narrow."
    )


def differences(report: Report, against: str) -> str:
    """A table of all other settings against one, by name; refused if there is no such result."""
    named = {result.name: result for result in report.results}
    if against not in named:
        raise UserError(f"--against {against!r}: not in the report, which has {', '.join(map(repr, named))}")
    headings = ["method", *(f"{heading}, more" for heading, _ in DIFFERENCES.values())]
    rows = [[result.name, *(text for text, _ in more)] for result, more in compared(report, named[against])]
    told = f"More than {against} has, paired by document; in brackets 95% intervals, by a bootstrap over documents."
    if len(report.setup["documents"]) < FEWEST:
        told += f" {sureness(report)}"
    return document(headings, rows, told)


def caption(report: Report) -> str:
    """Text, models, machine, versions and date."""
    setup = report.setup
    count, positions = len(setup["documents"]), setup["positions"]
    text = (
        f"{count * positions:,} positions, {positions:,} each of {count} documents after {setup['context']:,} tokens "
        f"of context, K = {setup['draft_tokens']}; in brackets 95% intervals, by a bootstrap over documents; "
        f"acceptance of the free run over {count * setup['free_tokens']:,} greedy tokens. "
        f"{setup['models']['target']['name']} with {setup['models']['draft']['name']}, {setup['dtype']}; "
        f"{where(report.provenance)}."
    )
    if len({(machine(of), of.get("commit")) for of in (result.provenance for result in report.results)}) > 1:
        text += " Not all from one machine and commit: see the provenance of each setting."
    return text
