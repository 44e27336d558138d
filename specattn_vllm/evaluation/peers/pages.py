"""Whole pages of the cache, chosen by a score of each."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from specattn_vllm.evaluation.peers.rows import Chosen, Rows, budget, heaviest


class Pages(NamedTuple):
    """The prefixes of the rows in P pages of `size` tokens."""

    size: int
    keys: torch.Tensor
    """[V, H, P, size, D] float32, arbitrary where no token of the prefix lies."""
    there: torch.Tensor
    """[V, 1, P, size, 1] bool: where one does."""
    count: torch.Tensor
    """[V] int64: pages that a prefix has, the last of them maybe in part."""

    @classmethod
    def of(cls, rows: Rows, size: int) -> Pages:
        inside = rows.in_prefix
        padding = -inside.shape[1] % size
        keys = F.pad(rows.keys, (0, 0, 0, padding)).unflatten(2, (-1, size))
        there = F.pad(inside, (0, padding)).unflatten(1, (-1, size))[:, None, :, :, None]
        return cls(size, keys, there, (rows.prefix + size - 1) // size)

    @property
    def used(self) -> torch.Tensor:
        """[V, P] bool: pages that hold a token of the prefix."""
        return torch.arange(self.keys.shape[2], device=self.count.device) < self.count[:, None]

    def choose(self, rows: Rows, scores: torch.Tensor, ratio: float, *, first: bool = False) -> Chosen:
        """Those with the largest scores [V, H, G, Q, P], up to a share of the prefix, in whole pages. The page that the
        prefix ends in is always among them, and the `first` where asked for, if there is room for two; the order for a
        single query is that of its scores."""
        used, inside = self.used, rows.in_prefix
        page = torch.arange(used.shape[1], device=used.device)
        weights = rows.distribution(scores, used)
        if first:
            weights = weights.masked_fill(page == 0, 2.0)
        weights = weights.masked_fill((page == self.count[:, None] - 1)[:, None], torch.inf)
        wanted = (budget(ratio, rows.prefix) + self.size - 1) // self.size
        kept = heaviest(weights, used[:, None], wanted[:, None, None])
        tokens = kept.repeat_interleave(self.size, dim=2)[:, :, : inside.shape[1]] & inside[:, None]
        return Chosen(tokens, (self.count * self.size)[:, None].expand(kept.shape[:2]))
