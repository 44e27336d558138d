"""Which draft layer attends most like each target layer, and which of its heads like each target head.

Layers (Shah, arXiv 2510.27641, section 3): each is one distribution over the key positions, its heads averaged; they
are compared by KL divergence, and a dynamic programme picks the best map that never steps back in depth.

Heads (Xu et al., arXiv 2605.15508): each KV head is one distribution, the query heads that share it averaged, and is
mapped to the head of the mapped draft layer whose attention it has most in common with. The paper compares sets of the
most attended positions by their Jaccard index; the overlap of the distributions needs no size of such a set.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

EPSILON = 1e-6
"""Added to every probability before the logarithm, and divided out: (a + EPSILON) / (1 + EPSILON * keys).

bf16 weights and fp32 softmax put exact zeros on far keys. Without it a single zero of the draft would make the
divergence infinite; with it, a key the draft ignores costs at most log(1 / EPSILON), about 14 nats.
"""

JACCARD_TOP = 64
"""Keys in the sets that `head_jaccard` compares. The paper's number is not known to us; an independent
re-implementation takes 64."""


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


def head_overlap(target_attn: torch.Tensor, draft_attn: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Mass that two heads put on the same keys, the sum of minima, summed over the queries: float64 [Ht, Hd].

    target_attn: [Ht, queries, keys] and draft_attn: [Hd, queries, keys], distributions of the same queries over their
    visible keys, 0 elsewhere. lengths: [queries], not needed here; as for `head_jaccard`.
    """
    return torch.stack([torch.minimum(head, draft_attn).sum((1, 2), dtype=torch.float64) for head in target_attn])


def head_jaccard(
    target_attn: torch.Tensor, draft_attn: torch.Tensor, lengths: torch.Tensor, top: int = JACCARD_TOP
) -> torch.Tensor:
    """Jaccard index of the `top` most attended keys of two heads, summed over the queries: float64 [Ht, Hd].

    Shapes as in `head_overlap`; a query that sees `top` keys or fewer has all of them in both sets.
    """
    visible = torch.arange(target_attn.shape[-1], device=target_attn.device) < lengths[:, None]

    def sets(attn: torch.Tensor) -> torch.Tensor:
        best = attn.masked_fill(~visible, -1.0).topk(min(top, attn.shape[-1])).indices
        return torch.zeros_like(attn, dtype=torch.bool).scatter_(-1, best, True) & visible

    ours, theirs = sets(target_attn), sets(draft_attn)
    shared = [(head & theirs).sum(-1).double() / (head | theirs).sum(-1) for head in ours]
    return torch.stack(shared).sum(-1)


HEAD_SIMILARITIES = {"overlap": head_overlap, "jaccard": head_jaccard}


class HeadSimilarity:
    """Mean of a head similarity over batches of queries, for every pair of layers."""

    def __init__(self, kind: str):
        """kind: a key of HEAD_SIMILARITIES."""
        self._between = HEAD_SIMILARITIES[kind]
        self.queries = 0
        self._total: torch.Tensor | float = 0.0

    def add(self, target_attn: torch.Tensor, draft_attn: torch.Tensor, lengths: torch.Tensor) -> None:
        """Take in one batch: [target layers, Ht, queries, keys] and [draft layers, Hd, queries, keys]."""
        pairs = [torch.stack([self._between(a, b, lengths) for b in draft_attn]) for a in target_attn]
        self._total = self._total + torch.stack(pairs).cpu()
        self.queries += len(lengths)

    def mean(self) -> torch.Tensor:
        """A query's mean, float64 [target layers, draft layers, Ht, Hd]; 1 means equal, 0 nothing in common."""
        if not self.queries:
            raise ValueError("no queries were added")
        return self._total / self.queries


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
