"""How much of one budget each target layer reads, from what reading less costs it.

Measured for one layer at a time, the others reading everything: a curve of cost against the share of the context that
it reads. Costs of layers are taken to add up; the best division then spends every bit of the budget where it saves the
most, along the lower convex hull of each curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

GRID = (0.01, 0.02, 0.04, 0.06, 0.09, 0.125, 0.18, 0.25, 0.35, 0.5, 0.75)
"""Shares of the context that are measured; at 1 a layer costs nothing."""


def hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lower convex hull of (share, cost), from the smallest share to the first of the lowest cost.

    What lies above it, and what reads more without costing less, is never worth its budget.
    """
    found: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if found and y >= found[-1][1]:
            continue
        while len(found) > 1:
            (x1, y1), (x2, y2) = found[-2:]
            if (y2 - y1) * (x - x1) < (y - y1) * (x2 - x1):
                break
            found.pop()
        found.append((x, y))
    return found


def divide(curves: Sequence[Sequence[tuple[float, float]]], budget: float) -> list[float]:
    """The share of each layer, `budget` on average, with the least total cost.

    curves: of each layer, points (share, cost). A budget below what all layers read at least gives those least shares;
    one that is more than any layer can use is not spent.
    """
    hulls = [hull(points) for points in curves]
    shares = [points[0][0] for points in hulls]
    left = budget * len(hulls) - sum(shares)
    # Along a hull every segment saves less per share than the one before, so this order takes them in their own.
    segments = [
        ((y2 - y1) / (x2 - x1), layer, at, x2 - x1)
        for layer, points in enumerate(hulls)
        for at, ((x1, y1), (x2, y2)) in enumerate(pairwise(points))
    ]
    for _, layer, _, width in sorted(segments):
        if left <= 0:
            break
        taken = min(width, left)
        shares[layer] += taken
        left -= taken
    return shares


def least_budget(
    curves: Sequence[Sequence[tuple[float, float]]], lost: Sequence[Sequence[tuple[float, float]]], goal: float
) -> float:
    """The least budget, to a thousandth, divided by `curves`, with which layers lose no more than `goal` on average.

    lost: of each layer, points (share, what it loses); nothing at 1.
    """
    low, high = 0, 1000
    while low < high:
        middle = (low + high) // 2
        given = divide(curves, middle / 1000)
        if sum(map(cost_at, lost, given)) <= goal * len(given):
            high = middle
        else:
            low = middle + 1
    return low / 1000


def cost_at(points: Sequence[tuple[float, float]], share: float) -> float:
    """Cost of a layer that reads `share`, between the measured points on the straight line."""
    ordered = sorted(points)
    if share <= ordered[0][0]:
        return ordered[0][1]
    for (x1, y1), (x2, y2) in pairwise(ordered):
        if share <= x2:
            return y1 + (y2 - y1) * (share - x1) / (x2 - x1)
    return ordered[-1][1]


def relative(shares: Sequence[float]) -> list[float]:
    """The same with a mean of 1, as layer maps have them, rounded to a thousandth but never to nothing."""
    mean = sum(shares) / len(shares)
    return [max(0.001, round(share / mean, 3)) for share in shares]
