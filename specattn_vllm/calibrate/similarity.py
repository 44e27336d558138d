"""How well a draft layer or head fits a target layer or head, for one window of text.

`retained` is what a map is for: the draft chooses the tokens that it attends to most, as many as the budget allows, and
the target's attention on them is what its pruned verification keeps.

The papers compare the attention itself. Layers (Shah, arXiv 2510.27641, section 3): the attention of a layer, averaged
over its heads, is one distribution over key positions. Layers are compared by KL divergence. Heads (Xu et al., arXiv
2605.15508): the attention of a KV head, averaged over the query heads that share it, is one distribution. Heads are
compared by the Jaccard index of the sets of their most attended positions.

All three functions take ours [A, queries, keys] and theirs [B, queries, keys]: distributions of the same queries over
their visible keys, 0 elsewhere; and lengths [queries]: the number of keys that each query sees (its position + 1). They
return float64 [A, B], summed over the queries; greater means more similar.
"""

from __future__ import annotations

from functools import partial

import torch

from specattn_vllm.calibrate.models import look

EPSILON = 1e-6
"""Added to every probability before the logarithm, then normalised: (a + EPSILON) / (1 + EPSILON * keys).

With bf16 weights and fp32 softmax, distant keys get exact zeros. Without EPSILON, a single zero of the draft would make
the divergence infinite. With it, a key that the draft ignores costs at most log(1 / EPSILON), about 14 nats.
"""

JACCARD_TOP = 64
"""Number of keys in the sets that `jaccard` compares. We do not know the paper's number; an independent
re-implementation uses 64."""


def _visible(rows: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return torch.arange(rows.shape[-1], device=rows.device) < lengths[:, None]


def _smooth(rows: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Smoothed distributions, float64. Keys after a row's length stay 0: they are not part of the distribution."""
    return (rows.double() + EPSILON) / (1 + EPSILON * lengths.double()[:, None]) * _visible(rows, lengths)


def negative_kl(ours: torch.Tensor, theirs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """-KL(ours || theirs) in nats; 0 means equal."""
    p, q = _smooth(ours, lengths), _smooth(theirs, lengths)
    negative_entropy = torch.special.xlogy(p, p).sum((1, 2))
    # q is 0 only where p is 0 too. Replacing q by 1 there makes the product 0 instead of NaN.
    cross = torch.einsum("jrk,irk->ji", p, torch.where(q > 0, q, 1.0).log())
    return cross - negative_entropy[:, None]


def jaccard(ours: torch.Tensor, theirs: torch.Tensor, lengths: torch.Tensor, top: int = JACCARD_TOP) -> torch.Tensor:
    """Jaccard index of the sets of the `top` most attended keys. If a query sees fewer keys, both sets hold all."""
    visible = _visible(ours, lengths)

    def sets(attn: torch.Tensor) -> torch.Tensor:
        best = attn.masked_fill(~visible, -1.0).topk(min(top, attn.shape[-1])).indices
        return torch.zeros_like(attn, dtype=torch.bool).scatter_(-1, best, True) & visible

    a, b = sets(ours), sets(theirs)
    shared = [(one & b).sum(-1).double() / (one | b).sum(-1) for one in a]
    return torch.stack(shared).sum(-1)


def retained(ours: torch.Tensor, theirs: torch.Tensor, lengths: torch.Tensor, budget: float) -> torch.Tensor:
    """Mass of ours on the keys that theirs attends to most: ceil(budget * length) keys of each query."""
    counts = torch.ceil(budget * lengths.double()).long()
    best = theirs.masked_fill(~_visible(theirs, lengths), -1.0).topk(int(counts.max()), dim=-1).indices
    within = torch.arange(best.shape[-1], device=best.device) < counts[:, None]
    chosen = torch.zeros_like(theirs, dtype=torch.bool).scatter(-1, best, within.expand_as(best))
    return torch.einsum("jrk,irk->ji", ours.double(), chosen.double())


def sampled_queries(window: int, count: int, seed: int, index: int) -> torch.Tensor:
    """[count] int64: query positions for window number `index`, ascending. None is in the window's first sixteenth,
    because a query with few keys tells little about the keys that a layer chooses."""
    first = window // 16
    # Each window has its own generator, so that it can be measured without the windows before it.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    return (first + torch.randperm(window - first, generator=generator)[:count]).sort().values


def similarity_of_window(
    target: torch.nn.Module,
    draft: torch.nn.Module,
    ids: torch.Tensor,
    queries: torch.Tensor,
    with_heads: bool,
    budget: float | None = None,
) -> dict[str, torch.Tensor]:
    """Similarities in a window of token ids [tokens], float64 means over the queries [queries]: `layers` [target
    layers, draft layers], and with with_heads `heads` [target layers, draft layers, target KV heads, draft KV heads].
    With a budget they are what is retained, without one what the papers compare. Each target layer is compared at once,
    so only its rows and those of all draft layers are in memory."""
    theirs: list[torch.Tensor] = []
    look(draft, ids, queries, theirs.append)
    averaged = torch.stack([rows.mean(0) for rows in theirs])
    lengths = queries.to(averaged.device) + 1
    of_layers, of_heads = (negative_kl, jaccard) if budget is None else (partial(retained, budget=budget),) * 2
    layers: list[torch.Tensor] = []
    heads: list[torch.Tensor] = []

    def compare(rows: torch.Tensor) -> None:
        layers.append(of_layers(rows.mean(0, keepdim=True), averaged, lengths)[0])
        if with_heads:
            heads.append(torch.stack([of_heads(rows, one, lengths) for one in theirs]))

    look(target, ids, queries, compare)
    found = {"layers": layers, "heads": heads} if with_heads else {"layers": layers}
    return {name: torch.stack(of).cpu() / len(queries) for name, of in found.items()}
