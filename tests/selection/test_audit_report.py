"""What the totals of audits say."""

from __future__ import annotations

import math

import pytest
import torch

from specattn_vllm.selection.audit_report import BINS, AuditTotals, lower_edge, quantile

LAYERS = [f"layers.{i}" for i in (1, 3, 4)]


def totals(histogram: torch.Tensor, pairs: list[int], **more) -> AuditTotals:
    given = {
        "retained": torch.zeros(len(pairs)).double(),
        "bound": torch.zeros(len(pairs)).double(),
        "largest_bound": torch.zeros(len(pairs)),
    } | more
    return AuditTotals(tuple(LAYERS[: len(pairs)]), 4, histogram, torch.tensor(pairs), **given)


def test_bins_are_narrow_where_most_is_retained():
    edges = [lower_edge(b) for b in range(BINS + 1)]
    assert edges[0] == 0 and edges[-1] == 1 and edges == sorted(edges)
    assert edges[1] < 0.04 and edges[-2] > 0.9997


def test_a_quantile_is_the_edge_of_its_bin():
    histogram = torch.zeros(BINS, dtype=torch.int64)
    assert math.isnan(quantile(histogram, 0.5))
    histogram[3], histogram[40], histogram[60] = 1, 49, 50
    got = [quantile(histogram, q) for q in (0.001, 0.01, 0.02, 0.5, 0.51, 1.0)]
    assert got == [lower_edge(b) for b in (3, 3, 40, 40, 60, 60)]


def test_the_report_is_by_layer_and_leaves_out_what_was_not_audited():
    histogram = torch.zeros(3, BINS, dtype=torch.int64)
    histogram[0, 50], histogram[2, 10] = 8, 4
    made = totals(
        histogram,
        [2, 0, 1],
        retained=torch.tensor([7.6, 0, 1.2]).double(),
        bound=torch.tensor([0.8, 0, 4]).double(),
        largest_bound=torch.tensor([0.5, 0, 2]),
    )
    report = made.by_layer()
    assert list(report) == [LAYERS[0], LAYERS[2]]
    edge = lower_edge(50)
    assert report[LAYERS[0]] == {
        "pairs": 2,
        "retained_p1": edge,
        "retained_p10": edge,
        "retained_p50": edge,
        "retained_mean": pytest.approx(0.95),
        "bound_mean": pytest.approx(0.1),
        "bound_max": 0.5,
    }
    assert made.line() == (
        f"specattn: audit of 3 pairs of layer and request: retained mass p1 {lower_edge(10):.3f}, "
        f"p10 {lower_edge(10):.3f}, p50 {edge:.3f}; lowest mean 0.300 in layers.4; error bound 0.4 on average"
    )
