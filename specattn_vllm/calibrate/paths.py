"""From similarities to a map: which draft layer for each target layer, and which of its heads for each head."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

# Rule -> whether draft layer `i` may follow draft layer `before`, one target layer earlier.
STEPS: dict[str, Callable[[int, int], bool]] = {
    "monotone": lambda before, i: i >= before,
    "ends": lambda before, i: i >= before,
    "onto": lambda before, i: before <= i <= before + 1,
    "one-to-one": lambda before, i: i > before,
    "free": lambda before, i: True,
}
"""`monotone` never steps back in depth (Shah, arXiv 2510.27641, section 3); `ends` also maps first to first and last to
last; `onto` uses every draft layer; `one-to-one` uses none twice; `free` takes the most alike, whatever its depth."""


def layer_path(similarity: Sequence[Sequence[float]] | torch.Tensor, rule: str = "monotone") -> list[int]:
    """The map from target to draft layers with the greatest total similarity among those that the rule allows.

    similarity: [m target layers][n draft layers]. A dynamic programme over target layers: the best total that ends in
    each draft layer, O(m n^2). Among equals the smaller index wins, from the last target layer back.
    Raises ValueError for NaN, no layers, or a rule that no map of these sizes fulfils.
    """
    rows = [[float(value) for value in row] for row in similarity]
    if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError("the similarity has to be a matrix with at least one target and one draft layer")
    if any(value != value for row in rows for value in row):
        raise ValueError("the similarity contains NaN")
    m, n = len(rows), len(rows[0])
    tied = rule in ("ends", "onto")
    barred = float("-inf")
    best = [value if i == 0 or not tied else barred for i, value in enumerate(rows[0])]
    came_from: list[list[int]] = []
    for row in rows[1:]:
        before = [
            max((b for b in range(n) if STEPS[rule](b, i)), key=best.__getitem__, default=None) for i in range(n)
        ]
        came_from.append([0 if b is None else b for b in before])
        best = [barred if b is None else value + best[b] for b, value in zip(before, row, strict=True)]
    last = n - 1 if tied else max(range(n), key=best.__getitem__)
    if best[last] == barred:
        raise ValueError(f"no map of {m} target layers to {n} draft layers is {rule!r}")
    path = [last]
    for step in reversed(came_from):
        path.append(step[path[-1]])
    return path[::-1]


def head_map(similarity: torch.Tensor, ranks: int = 1) -> list[int]:
    """For each target head the draft head most similar to it, the first among equals.

    similarity: [Ht, Hd]. With tensor-parallel `ranks` only heads of the same rank are considered; the map then serves
    any number of ranks that divides that one. Raises ValueError if the ranks do not divide both numbers of heads.
    """
    ours, theirs = similarity.shape
    if ours % ranks or theirs % ranks:
        raise ValueError(f"{ranks} ranks do not divide {ours} target heads and {theirs} draft heads")
    first = [h // (ours // ranks) * (theirs // ranks) for h in range(ours)]
    return [f + int(similarity[h, f : f + theirs // ranks].argmax()) for h, f in enumerate(first)]
