"""Which draft layer attends most like each target layer, and the monotone map made of that.

The method is layer-shared mapping (Shah, arXiv 2510.27641, section 3): each layer is one distribution over the key
positions, its heads averaged; layers are compared by KL divergence, and a dynamic programme picks the best map that
never steps back in depth.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

EPSILON = 1e-6
"""Added to every probability before the logarithm, and divided out: (a + EPSILON) / (1 + EPSILON * keys).

bf16 weights and fp32 softmax put exact zeros on far keys. Without it a single zero of the draft would make the
divergence infinite; with it, a key the draft ignores costs at most log(1 / EPSILON), about 14 nats.
"""


def smooth(rows: torch.Tensor, lengths: torch.Tensor, epsilon: float = EPSILON) -> torch.Tensor:
    """Smoothed distributions, float64.

    rows: [layers, queries, keys], each row a distribution over its first `lengths[query]` keys.
    lengths: [queries], the number of keys a query sees (its position + 1).
    Keys behind a row's length stay 0: they are no part of the distribution.
    """
    visible = torch.arange(rows.shape[-1], device=rows.device) < lengths[:, None]
    smoothed = (rows.double() + epsilon) / (1 + epsilon * lengths.double()[:, None])
    return smoothed * visible


def layer_similarity(
    target_attn: torch.Tensor, draft_attn: torch.Tensor, lengths: torch.Tensor, epsilon: float = EPSILON
) -> torch.Tensor:
    """-KL(target layer || draft layer) in nats for every pair of layers, summed over the queries: float64 [m, n].

    target_attn: [m, queries, keys] and draft_attn: [n, queries, keys], head-averaged attention of the same queries.
    """
    if target_attn.shape[1:] != draft_attn.shape[1:]:
        raise ValueError(f"queries and keys differ: {tuple(target_attn.shape)} and {tuple(draft_attn.shape)}")
    p, q = smooth(target_attn, lengths, epsilon), smooth(draft_attn, lengths, epsilon)
    negative_entropy = torch.special.xlogy(p, p).sum((1, 2))
    # log 0 only stands where p is 0 too; 1 makes that product 0 rather than NaN.
    cross = torch.einsum("jrk,irk->ji", p, torch.where(q > 0, q, 1.0).log())
    return cross - negative_entropy[:, None]


class Similarity:
    """Mean of `layer_similarity` over batches of queries."""

    def __init__(self, target_layers: int, draft_layers: int, epsilon: float = EPSILON):
        self.epsilon = epsilon
        self.queries = 0
        self._total = torch.zeros(target_layers, draft_layers, dtype=torch.float64)

    def add(self, target_attn: torch.Tensor, draft_attn: torch.Tensor, lengths: torch.Tensor) -> None:
        """Take in one batch; shapes as in `layer_similarity`."""
        self._total += layer_similarity(target_attn, draft_attn, lengths, self.epsilon).cpu()
        self.queries += len(lengths)

    def mean(self) -> torch.Tensor:
        """-KL in nats a query, float64 [target layers, draft layers]; 0 means equal, more negative means less alike."""
        if not self.queries:
            raise ValueError("no queries were added")
        return self._total / self.queries


def monotone_map(similarity: Sequence[Sequence[float]] | torch.Tensor) -> list[int]:
    """The non-decreasing map from target to draft layers with the greatest total similarity.

    similarity: [m target layers][n draft layers]. Solved by D[j, i] = S[j, i] + max over i' <= i of D[j-1, i'] in
    O(m n); the prefix maximum is carried along. Among equals the smaller index wins, from the last target layer back.
    """
    rows = [[float(value) for value in row] for row in similarity]
    if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError("the similarity has to be a matrix with at least one target and one draft layer")
    if any(value != value for row in rows for value in row):
        raise ValueError("the similarity contains NaN")
    best_before = [0.0] * len(rows[0])
    choices = []  # choices[j][i]: the draft layer of target layer j, if that may be at most i
    for row in rows:
        choice, best, prefix = [], [], 0
        for i, value in enumerate(row):
            best.append(value + best_before[i])
            if best[i] > best[prefix]:
                prefix = i
            choice.append(prefix)
        choices.append(choice)
        best_before = [best[i] for i in choice]
    layers, limit = [], len(rows[0]) - 1
    for choice in reversed(choices):
        limit = choice[limit]
        layers.append(limit)
    return layers[::-1]
