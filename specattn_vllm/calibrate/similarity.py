"""How alike two layers, or two heads, attend: the papers' ways to compare them.

Layers (Shah, arXiv 2510.27641, section 3): each is one distribution over the key positions, its heads averaged; they
are compared by KL divergence. Heads (Xu et al., arXiv 2605.15508): each KV head is one distribution, the query heads
that share it averaged; they are compared by the Jaccard index of the sets of their most attended positions.

Every function takes ours [A, queries, keys] and theirs [B, queries, keys], distributions of the same queries over their
visible keys, 0 elsewhere, and lengths [queries], the number of keys that each query sees (its position + 1). It returns
float64 [A, B], summed over the queries; greater is more alike.
"""

from __future__ import annotations

import torch

EPSILON = 1e-6
"""Added to every probability before the logarithm, and divided out: (a + EPSILON) / (1 + EPSILON * keys).

bf16 weights and fp32 softmax put exact zeros on far keys. Without it a single zero of the draft would make the
divergence infinite; with it, a key the draft ignores costs at most log(1 / EPSILON), about 14 nats.
"""

JACCARD_TOP = 64
"""Keys in the sets that `jaccard` compares. The paper's number is not known to us; an independent re-implementation
takes 64."""


def smooth(rows: torch.Tensor, lengths: torch.Tensor, epsilon: float = EPSILON) -> torch.Tensor:
    """Smoothed distributions, float64; keys behind a row's length stay 0: they are no part of the distribution."""
    visible = torch.arange(rows.shape[-1], device=rows.device) < lengths[:, None]
    smoothed = (rows.double() + epsilon) / (1 + epsilon * lengths.double()[:, None])
    return smoothed * visible


def negative_kl(
    ours: torch.Tensor, theirs: torch.Tensor, lengths: torch.Tensor, epsilon: float = EPSILON
) -> torch.Tensor:
    """-KL(ours || theirs) in nats: 0 is equal."""
    if ours.shape[1:] != theirs.shape[1:]:
        raise ValueError(f"queries and keys differ: {tuple(ours.shape)} and {tuple(theirs.shape)}")
    p, q = smooth(ours, lengths, epsilon), smooth(theirs, lengths, epsilon)
    negative_entropy = torch.special.xlogy(p, p).sum((1, 2))
    # log 0 only stands where p is 0 too; 1 makes that product 0 rather than NaN.
    cross = torch.einsum("jrk,irk->ji", p, torch.where(q > 0, q, 1.0).log())
    return cross - negative_entropy[:, None]


def jaccard(ours: torch.Tensor, theirs: torch.Tensor, lengths: torch.Tensor, top: int = JACCARD_TOP) -> torch.Tensor:
    """Jaccard index of the `top` most attended keys of each; a query that sees no more has all of them in both sets."""
    visible = torch.arange(ours.shape[-1], device=ours.device) < lengths[:, None]

    def sets(attn: torch.Tensor) -> torch.Tensor:
        best = attn.masked_fill(~visible, -1.0).topk(min(top, attn.shape[-1])).indices
        return torch.zeros_like(attn, dtype=torch.bool).scatter_(-1, best, True) & visible

    a, b = sets(ours), sets(theirs)
    shared = [(one & b).sum(-1).double() / (one | b).sum(-1) for one in a]
    return torch.stack(shared).sum(-1)


SIMILARITIES = {"kl": negative_kl, "jaccard": jaccard}
