"""Makes a map from similarities: a draft layer for each target layer, and a draft KV head for each target KV head."""

from __future__ import annotations

import json
import re
from typing import Any

import torch


def layer_path(similarity: torch.Tensor) -> list[int]:
    """The map from target layers to draft layers with the greatest total similarity, among maps in which the draft
    layer never decreases from one target layer to the next (Shah, arXiv 2510.27641, section 3).

    similarity: [m target layers, n draft layers]. Dynamic programming over target layers keeps the best total that ends
    in each draft layer, O(m n^2). Among equal totals the smaller index wins, from the last target layer back.
    """
    best, *rows = similarity.double().tolist()
    came_from: list[list[int]] = []
    for row in rows:
        came_from.append([max(range(i + 1), key=best.__getitem__) for i in range(len(row))])
        best = [value + best[before] for before, value in zip(came_from[-1], row, strict=True)]
    path = [max(range(len(best)), key=best.__getitem__)]
    for step in reversed(came_from):
        path.append(step[path[-1]])
    return path[::-1]


def head_map(similarity: torch.Tensor, ranks: int = 1) -> list[int]:
    """For each target KV head, the most similar draft KV head; the first one among equals (Xu et al., arXiv
    2605.15508).

    similarity: [Ht, Hd]. `ranks`: number of tensor-parallel ranks, which must divide both. Only heads of the same rank
    are considered. The map then also works with every number of ranks that divides `ranks`.
    """
    ours, theirs = (heads // ranks for heads in similarity.shape)
    first = [h // ours * theirs for h in range(len(similarity))]
    return [f + int(similarity[h, f : f + theirs].argmax()) for h, f in enumerate(first)]


def as_json(found: dict[str, Any]) -> str:
    """The text of a map file: indented JSON, with each innermost list on one line."""

    def on_a_line(match: re.Match) -> str:
        return "[" + " ".join(match[1].split()) + "]"

    return re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", on_a_line, json.dumps(found, indent=1)) + "\n"
