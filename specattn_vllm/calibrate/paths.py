"""From similarities to a map: which draft layer for each target layer, and which of its heads for each head."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def layer_path(similarity: Sequence[Sequence[float]] | torch.Tensor, rule: str = "monotone") -> list[int]:
    """The map from target to draft layers with the greatest total similarity: `monotone`, of those that never step back
    in depth (Shah, arXiv 2510.27641, section 3), or `free`, of all.

    similarity: [m target layers][n draft layers]. A dynamic programme over target layers: the best total that ends in
    each draft layer, O(m n^2). Among equals the smaller index wins, from the last target layer back.
    Raises ValueError for NaN or no layers.
    """
    matrix = torch.as_tensor(similarity, dtype=torch.float64)
    if matrix.dim() != 2 or not matrix.numel() or matrix.isnan().any():
        raise ValueError("the similarity has to be a matrix with target and draft layers, and without NaN")
    if rule == "free":
        return matrix.argmax(1).tolist()
    best, *rows = matrix.tolist()
    came_from: list[list[int]] = []
    for row in rows:
        came_from.append([max(range(i + 1), key=best.__getitem__) for i in range(len(row))])
        best = [value + best[before] for before, value in zip(came_from[-1], row, strict=True)]
    path = [max(range(len(best)), key=best.__getitem__)]
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
