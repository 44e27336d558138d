"""Figures of a setting, with 95% intervals over documents.

Positions of one document are alike, so documents are what there are many of. An interval is a bootstrap's (Efron,
Annals of Statistics 7, 1979): documents are drawn anew, as many as there are, `RESAMPLES` times, and the figure is made
of each draw; its ends are the 2.5th and the 97.5th percentile. Draws begin with the same seed and depend on nothing but
the number of documents: the same report gives the same interval, and two settings are compared on the same draws.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from specattn_vllm.evaluation.results import Estimate, Figures, Report, SettingResult
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


def estimate(figure: Figure, documents: int) -> Estimate:
    """The figure of all documents, and its interval where there are two or more."""
    value = float(figure(np.ones((1, documents)))[0])
    if documents < 2:
        return Estimate(value=value)
    low, high = np.quantile(figure(_drawn(documents)), ENDS)
    return Estimate(value=value, interval=(float(low), float(high)))


@functools.cache
def _drawn(documents: int) -> np.ndarray:
    """How often each document is drawn, [RESAMPLES, documents]."""
    generator = np.random.default_rng(SEED)
    return generator.multinomial(documents, np.full(documents, 1 / documents), size=RESAMPLES).astype(np.float64)


def ratio(sums: np.ndarray, counts: np.ndarray) -> Figure:
    """Of documents' sums [documents] to their counts [documents]: a mean over all that was counted."""
    return lambda weights: (weights @ sums) / (weights @ counts)


def mean(values: np.ndarray) -> Figure:
    """Of documents' means [documents] over as many positions each."""
    return ratio(values, np.ones_like(values))


def figures(result: SettingResult, dense: SettingResult, floor: SettingResult | None = None) -> Figures:
    """`floor`: the dense run in other batches."""
    forced = Counts(**result.forced)
    more, documents = mean(_of(result, "nll") - _of(dense, "nll")), len(result.documents)
    return Figures(
        kv_read=forced.kv_fraction,
        bytes_read=byte_fraction(forced, result.scan_share),
        draft_kv_read=forced.draft_kv_fraction,
        kl=estimate(mean(_of(result, "kl")), documents),
        kl_above_rounding=None if floor is None else estimate(mean(_of(result, "kl") - _of(floor, "kl")), documents),
        agreement=estimate(mean(_of(result, "agreement")), documents),
        perplexity_change=estimate(lambda weights: np.expm1(more(weights)), documents),
        acceptance_length=_acceptance(result),
        text_tokens=_along_the_text(result, "tokens"),
        text_greedy_tokens=_along_the_text(result, "greedy_tokens"),
    )


def rows_of(report: Report) -> list[tuple[SettingResult, Figures]]:
    """All settings of a report with their figures."""
    return [(result, figures(result, report.dense, report.floor)) for result in report.results]


class Difference(NamedTuple):
    """How much more one setting has than another, paired by document: what is hard in both cancels out."""

    kl: Estimate
    agreement: Estimate
    nll: Estimate
    """Nats a token, which is the relative change of perplexity where it is small."""
    acceptance_length: Estimate
    text_tokens: Estimate | None
    text_greedy_tokens: Estimate | None


def difference(result: SettingResult, other: SettingResult) -> Difference:
    def more(name: str) -> Estimate:
        return estimate(mean(_of(result, name) - _of(other, name)), len(result.documents))

    return Difference(
        kl=more("kl"),
        agreement=more("agreement"),
        nll=more("nll"),
        acceptance_length=_longer(result, other),
        text_tokens=_along_the_text(result, "tokens", other),
        text_greedy_tokens=_along_the_text(result, "greedy_tokens", other),
    )


def _of(result: SettingResult, name: str) -> np.ndarray:
    return np.array([getattr(document, name) for document in result.documents])


def _acceptance(result: SettingResult) -> Estimate:
    length = _tokens_a_round(result)
    if length is None:
        return Estimate(value=Counts(**result.free).acceptance_length)
    return estimate(length, len(result.documents))


def _longer(result: SettingResult, other: SettingResult) -> Estimate:
    one, two = _tokens_a_round(result), _tokens_a_round(other)
    if one is None or two is None:
        return Estimate(value=_acceptance(result).value - _acceptance(other).value)
    return estimate(lambda weights: one(weights) - two(weights), len(result.documents))


def _along_the_text(result: SettingResult, name: str, other: SettingResult | None = None) -> Estimate | None:
    """Mean over all rounds, or how much more it is than another's; None where it was not measured."""
    lengths = [_of_rounds(each, name) for each in (result, other) if each is not None]
    if None in lengths:
        return None
    first, *less = lengths
    return estimate(lambda weights: first(weights) - sum(of(weights) for of in less), len(result.documents))


def _of_rounds(result: SettingResult, name: str) -> Figure | None:
    drafts = [document.drafts for document in result.documents]
    if None in drafts:
        return None
    rounds = np.array([of.rounds for of in drafts])
    return ratio(np.array([getattr(of, name) for of in drafts]) * rounds, rounds)


def _tokens_a_round(result: SettingResult) -> Figure | None:
    """None in reports from before the rounds of each document were kept."""
    if any(document.rounds is None for document in result.documents):
        return None
    return ratio(_of(result, "sampled_tokens"), _of(result, "rounds"))
