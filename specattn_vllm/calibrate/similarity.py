"""How alike two layers, or two heads, attend: the papers' ways to compare them, and a window compared by them.

Layers (Shah, arXiv 2510.27641, section 3): each is one distribution over the key positions, its heads averaged; they
are compared by KL divergence. Heads (Xu et al., arXiv 2605.15508): each KV head is one distribution, the query heads
that share it averaged; they are compared by the Jaccard index of the sets of their most attended positions.

Both take ours [A, queries, keys] and theirs [B, queries, keys], distributions of the same queries over their visible
keys, 0 elsewhere, and lengths [queries], the number of keys that each query sees (its position + 1). They return
float64 [A, B], summed over the queries; greater is more alike.
"""

from __future__ import annotations

import torch

from specattn_vllm.calibrate.models import look

EPSILON = 1e-6
"""Added to every probability before the logarithm, and divided out: (a + EPSILON) / (1 + EPSILON * keys).

bf16 weights and fp32 softmax put exact zeros on far keys. Without it a single zero of the draft would make the
divergence infinite; with it, a key the draft ignores costs at most log(1 / EPSILON), about 14 nats.
"""

JACCARD_TOP = 64
"""Keys in the sets that `jaccard` compares. The paper's number is not known to us; an independent re-implementation
takes 64."""


def _visible(rows: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return torch.arange(rows.shape[-1], device=rows.device) < lengths[:, None]


def _smooth(rows: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Smoothed distributions, float64; keys behind a row's length stay 0: they are no part of the distribution."""
    return (rows.double() + EPSILON) / (1 + EPSILON * lengths.double()[:, None]) * _visible(rows, lengths)


def negative_kl(ours: torch.Tensor, theirs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """-KL(ours || theirs) in nats: 0 is equal."""
    p, q = _smooth(ours, lengths), _smooth(theirs, lengths)
    negative_entropy = torch.special.xlogy(p, p).sum((1, 2))
    # log 0 only stands where p is 0 too; 1 makes that product 0 rather than NaN.
    cross = torch.einsum("jrk,irk->ji", p, torch.where(q > 0, q, 1.0).log())
    return cross - negative_entropy[:, None]


def jaccard(ours: torch.Tensor, theirs: torch.Tensor, lengths: torch.Tensor, top: int = JACCARD_TOP) -> torch.Tensor:
    """Jaccard index of the `top` most attended keys of each; a query that sees no more has all of them in both sets."""
    visible = _visible(ours, lengths)

    def sets(attn: torch.Tensor) -> torch.Tensor:
        best = attn.masked_fill(~visible, -1.0).topk(min(top, attn.shape[-1])).indices
        return torch.zeros_like(attn, dtype=torch.bool).scatter_(-1, best, True) & visible

    a, b = sets(ours), sets(theirs)
    shared = [(one & b).sum(-1).double() / (one | b).sum(-1) for one in a]
    return torch.stack(shared).sum(-1)


def sampled_queries(window: int, count: int, seed: int, index: int) -> torch.Tensor:
    """[count] int64: query positions of the window of that index, ascending; none in its first sixteenth, since a query
    with a handful of keys says little about which keys a layer chooses."""
    first = window // 16
    # Of each window's own, so that one can be measured without those before it.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    return (first + torch.randperm(window - first, generator=generator)[:count]).sort().values


def similarity_of_window(
    target: torch.nn.Module, draft: torch.nn.Module, ids: torch.Tensor, queries: torch.Tensor, with_heads: bool
) -> dict[str, torch.Tensor]:
    """Of a window of token ids [tokens], float64 means over the queries [queries]: `layers` [target layers, draft
    layers], and if asked for `heads` [target layers, draft layers, target KV heads, draft KV heads]. The target's rows
    are compared as they come, so those of one of its layers are in memory at a time, and the draft's."""
    theirs: list[torch.Tensor] = []
    look(draft, ids, queries, theirs.append)
    averaged = torch.stack([rows.mean(0) for rows in theirs])
    lengths = queries.to(averaged.device) + 1
    layers: list[torch.Tensor] = []
    heads: list[torch.Tensor] = []

    def compare(rows: torch.Tensor) -> None:
        layers.append(negative_kl(rows.mean(0, keepdim=True), averaged, lengths)[0])
        if with_heads:
            heads.append(torch.stack([jaccard(rows, one, lengths) for one in theirs]))

    look(target, ids, queries, compare)
    found = {"layers": layers, "heads": heads} if with_heads else {"layers": layers}
    return {name: torch.stack(of).cpu() / len(queries) for name, of in found.items()}
