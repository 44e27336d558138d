"""Figures of a setting: means, intervals by document, and differences to another setting."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from specattn_vllm.evaluation import figures as compute
from specattn_vllm.evaluation import report as tables
from specattn_vllm.evaluation import settings
from specattn_vllm.evaluation.figures import Estimate
from specattn_vllm.evaluation.results import Report


@pytest.fixture
def dense_of_four(of_documents):
    return of_documents(settings.DENSE, nll=[2.0] * 4)


def test_intervals_are_over_documents(half, of_documents, dense_of_four):
    kl, agreement, nll = [0.01, 0.04, 0.02, 0.05], [0.9, 0.8, 0.95, 0.7], [2.01, 2.03, 1.98, 2.05]
    found = compute.figures(of_documents(half, kl=kl, agreement=agreement, nll=nll), dense_of_four)
    more = [loss - 2.0 for loss in nll]
    assert found["perplexity_change"].value == pytest.approx(math.exp(np.mean(more)) - 1)
    for estimate, values in ((found["kl"], kl), (found["agreement"], agreement), (found["perplexity_change"], more)):
        # The mean of four draws: its standard error is that of the sample over the root of four.
        error = np.std(values) / 2
        for end, sign in zip(estimate.interval, (-1, 1), strict=True):
            assert end == pytest.approx(np.mean(values) + sign * 1.96 * error, abs=0.25 * error)
    assert found["kl"].value == pytest.approx(np.mean(kl))


def test_all_draws_of_three_documents_are_as_likely_as_they_should_be():
    """What the percentiles are taken of, against all 27 draws written out; and it is the same at every call."""
    sums, counts = np.array([6.0, 10.0, 40.0]), np.array([2.0, 4.0, 10.0])
    every = np.array(list(itertools.product(range(3), repeat=3)))
    exact = sums[every].sum(1) / counts[every].sum(1)
    drawn = []
    figure = compute.ratio(sums, counts)

    def kept(weights):
        drawn.append(figure(weights))
        return drawn[-1]

    found = compute.estimate(kept, 3)
    _, resampled = drawn
    assert found.value == pytest.approx(56 / 16)
    assert resampled.shape == (compute.RESAMPLES,)
    for value in np.unique(exact.round(9)):
        share = np.mean(np.isclose(resampled, value))
        assert share == pytest.approx(np.mean(np.isclose(exact, value)), abs=0.02), value
    assert compute.estimate(figure, 3) == found


def test_what_is_above_rounding_is_paired_by_document(half, of_documents, dense_of_four):
    """Rounding differs from document to document, and so does what is compared with it."""
    rounding = [0.001, 0.004, 0.002, 0.003]
    floor = of_documents(settings.DENSE, kl=rounding).model_copy(update={"other_batches": True})
    above = of_documents(half, kl=[kl + 0.02 for kl in rounding])
    report = Report(provenance={}, setup={}, results=[dense_of_four, floor, above])
    itself, found = (figures["kl_above_rounding"] for _, figures in compute.rows_of(report)[1:])
    assert (found.value, found.interval) == (pytest.approx(0.02), pytest.approx((0.02, 0.02)))
    assert (itself.value, itself.interval) == (0, (0, 0))
    shown, rows = tables.cells(report)
    at = shown.index("KL above rounding")
    assert [cells[at] for cells in rows] == ["reference", "floor", "0.0200 (0.0200 to 0.0200)"]
    del report.results[1]
    assert "KL above rounding" not in tables.cells(report)[0]


def test_one_document_has_no_interval(half, of_documents):
    found = compute.figures(of_documents(half, kl=[0.02]), of_documents(settings.DENSE, nll=[2.0]))
    assert found["kl"].interval is found["agreement"].interval is found["perplexity_change"].interval is None
    assert found["kl"].text(".4f") == "0.0200"


def test_the_acceptance_length_is_over_all_rounds_and_its_interval_over_documents(half, of_documents, dense_of_four):
    rounds, tokens = [10, 20, 40, 10], [50, 40, 120, 20]
    half = of_documents(half, rounds=rounds, sampled_tokens=tokens)
    found = compute.figures(half, dense_of_four)["acceptance_length"]
    assert found.value == pytest.approx(230 / 80)
    low, high = found.interval
    assert 2.0 <= low < found.value < high <= 5.0
    # Twice the tokens in the same rounds: the difference is as sure as the length itself.
    twice = of_documents(settings.DENSE, rounds=rounds, sampled_tokens=[2 * count for count in tokens])
    assert compute.difference(twice, half)["acceptance_length"] == found
    # Of two alike nothing is unsure, though documents differ.
    same = compute.difference(half, half)["acceptance_length"]
    assert (same.value, same.interval) == (0, (0, 0))


def test_what_rounds_to_zero_has_no_sign():
    assert Estimate(value=-1e-6, interval=(-1e-5, 1e-5)).text("+z.4f") == "+0.0000 (+0.0000 to +0.0000)"


@pytest.mark.parametrize(("interval", "sure"), [((0.1, 0.2), True), ((-0.2, -0.1), True), ((-0.1, 0.2), False)])
def test_a_difference_is_sure_if_its_interval_has_no_zero_in_it(interval, sure):
    assert Estimate(value=0.1, interval=interval).is_sure is sure
