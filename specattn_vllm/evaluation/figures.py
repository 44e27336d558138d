"""Figures of a setting, with 95% intervals over documents.

Positions of one document are alike, so documents are what there are many of. An interval is a bootstrap's (Efron,
Annals of Statistics 7, 1979): documents are drawn anew, as many as there are, `RESAMPLES` times, and its ends are the
2.5th and the 97.5th percentile of the figure. The same report gives the same draws, and two settings are compared on
the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from specattn_vllm.evaluation.results import Report, SettingResult
from specattn_vllm.evaluation.scan import byte_fraction
from specattn_vllm.stats import Counts

RESAMPLES = 10_000
SEED = 0
ENDS = (0.025, 0.975)

FEWEST = 6
"""Documents from which on a difference may be called sure: if 0 were the truth, that many would all lie on one side of
it less often than once in 20 times (2 x 0.5^6 = 3%; of five, 6%). Two tell nothing of what a third would do."""

Figure = Callable[[np.ndarray], np.ndarray]
"""From how often each document counts, [N, documents], to the figure of each of those N draws, [N]."""


class Estimate(NamedTuple):
    """A figure of all documents."""

    value: float
    interval: tuple[float, float] | None = None
    """Its ends at 95%; None with one document."""

    def text(self, form: str) -> str:
        """As `form` (of `format`) says; what rounds to zero has no sign."""
        told = format(self.value, form)
        if self.interval is None:
            return told
        low, high = (format(end, form) for end in self.interval)
        return f"{told} ({low} to {high})"

    @property
    def is_sure(self) -> bool:
        """Whether it is not 0, as far as the interval says: of few documents that is not far (`FEWEST`)."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def estimate(figure: Figure, documents: int) -> Estimate:
    """The figure of all documents, and its interval where there are two or more."""
    value = float(figure(np.ones((1, documents)))[0])
    if documents < 2:
        return Estimate(value)
    low, high = np.quantile(figure(_drawn(documents)), ENDS)
    return Estimate(value, (float(low), float(high)))


@functools.cache
def _drawn(documents: int) -> np.ndarray:
    """How often each document is drawn, [RESAMPLES, documents]."""
    generator = np.random.default_rng(SEED)
    return generator.multinomial(documents, np.full(documents, 1 / documents), size=RESAMPLES).astype(np.float64)


def ratio(sums: np.ndarray, counts: np.ndarray) -> Figure:
    """Of documents' sums [documents] to their counts [documents]: a mean over all that was counted."""
    return lambda weights: (weights @ sums) / (weights @ counts)


def measured(result: SettingResult) -> dict[str, Figure]:
    """What is known of each document: means over positions, and over rounds of the free run and along the text."""
    documents = result.documents

    def column(name: str) -> np.ndarray:
        return np.array([getattr(document, name) for document in documents])

    rounds = np.array([document.drafts.rounds for document in documents])
    tokens = {name: np.array([getattr(of.drafts, name) for of in documents]) for name in ("tokens", "greedy_tokens")}
    positions = np.ones(len(documents))  # of each as many
    return {
        **{name: ratio(column(name), positions) for name in ("nll", "kl", "agreement")},
        "acceptance_length": ratio(column("sampled_tokens"), column("rounds")),
        **{f"text_{name}": ratio(found * rounds, rounds) for name, found in tokens.items()},
    }


def difference(result: SettingResult, other: SettingResult) -> dict[str, Estimate]:
    """How much more one setting has than another, paired by document: what is hard in both cancels out. Loss ('nll') is
    in nats a token, which is the relative change of perplexity where it is small."""
    one, two = measured(result), measured(other)

    def more(name: str) -> Figure:
        return lambda weights: one[name](weights) - two[name](weights)

    return {name: estimate(more(name), len(result.documents)) for name in one}


def figures(
    result: SettingResult, dense: SettingResult, floor: SettingResult | None = None
) -> dict[str, float | Estimate]:
    """What the table shows. Shares of the cache's entries, and of bytes with what was searched, are those of the forced
    run; the change of perplexity is relative, 0.01 is one per cent more; KL above rounding is there where the `floor`,
    the dense run in other batches, is."""
    counts, documents = Counts.stored(result.forced), len(result.documents)
    own, full = measured(result), measured(dense)
    found: dict[str, float | Estimate] = {
        "kv_read": counts.kv_fraction,
        "bytes_read": byte_fraction(counts, result.scan_share),
        "draft_kv_read": counts.draft_kv_fraction,
        **{name: estimate(figure, documents) for name, figure in own.items()},
        "perplexity_change": estimate(lambda weights: np.expm1(own["nll"](weights) - full["nll"](weights)), documents),
    }
    if floor is not None:
        found["kl_above_rounding"] = difference(result, floor)["kl"]
    return found


def rows_of(report: Report) -> list[tuple[SettingResult, dict[str, float | Estimate]]]:
    """All settings of a report with their figures."""
    return [(result, figures(result, report.dense, report.floor)) for result in report.results]


def as_json(found: dict[str, float | Estimate]) -> dict[str, float | dict]:
    return {name: each._asdict() if isinstance(each, Estimate) else each for name, each in found.items()}
