"""What a peer is given, and what it gives back."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Chosen(NamedTuple):
    kept: torch.Tensor
    """[V, H, L] bool, tokens of the prefix that each KV head reads."""
    searched: torch.Tensor
    """[V, H] int64, entries that were searched for them."""


class Rows(NamedTuple):
    """The rows V of one step that verify, in one layer, padded to the longest: Q tokens each, L positions."""

    query: torch.Tensor
    """[V, H, G, Q, D] float32: G query heads for each of the H KV heads; zeros where a row has fewer tokens."""
    keys: torch.Tensor
    """[V, H, L, D] float32, arbitrary past the sequence's end."""
    values: torch.Tensor
    """Likewise, zeros past the end."""
    real: torch.Tensor
    """[V, Q] bool: tokens that are there."""
    prefix: torch.Tensor
    """[V] int64: positions before the first of them."""
    scale: float

    @property
    def positions(self) -> torch.Tensor:
        """[L]"""
        return torch.arange(self.keys.shape[2], device=self.keys.device)

    @property
    def in_prefix(self) -> torch.Tensor:
        """[V, L] bool"""
        return self.positions < self.prefix[:, None]

    def logits(self) -> torch.Tensor:
        """[V, H, G, Q, L], -inf where a token cannot see."""
        tokens = torch.arange(self.real.shape[1], device=self.real.device)
        last = self.prefix[:, None] + tokens.minimum(self.real.sum(-1, keepdim=True) - 1)
        visible = self.positions <= last[:, :, None]
        found = torch.einsum("vhgqd,vhld->vhgql", self.query, self.keys) * self.scale
        return found.masked_fill_(~visible[:, None, None], -torch.inf)

    def mean(self, found: torch.Tensor) -> torch.Tensor:
        """Mean of [V, H, G, Q, X] over the query heads and the tokens that are there: [V, H, X]."""
        weights = self.real / self.real.sum(-1, keepdim=True)
        return torch.einsum("vhgqx,vq->vhx", found, weights.to(found.dtype)) / found.shape[2]

    def distribution(self, scores: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        """Scores [V, H, G, Q, X] of what lies `inside` [V, X], as the mean of their softmax, [V, H, X]."""
        found = scores.masked_fill(~inside[:, None, None, None], torch.finfo(scores.dtype).min).softmax(-1)
        return self.mean(found)


def budget(ratio: float, length: torch.Tensor) -> torch.Tensor:
    """Tokens for a share of lengths [V] int64, rounded as `select_top_p` does."""
    return (length * round(ratio * 65536) + 65535) >> 16


def heaviest(weights: torch.Tensor, inside: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The `count` largest of weights [V, H, X] among those inside, as [V, H, X] bool; `inside` and `count` spread."""
    order = weights.masked_fill(~inside, -1.0).sort(dim=-1, descending=True, stable=True).indices
    taken = (torch.arange(weights.shape[2], device=weights.device) < count).expand_as(order)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, taken) & inside
