"""Tokens by a few channels of their keys, as Double Sparsity does (Yang et al., arXiv 2408.07092).

    score(q, token) = scale * sum over the chosen d of q_d k_d

The channels of a KV head are those with the largest |q_d| |k_d|, mean over the round's queries times mean over the
context's keys. The paper calibrates that before, and copies these channels of each key; here they are of the very
round, so that no calibration could know better.
"""

from __future__ import annotations

import torch

from specattn_vllm.evaluation.peer_options import Channels
from specattn_vllm.evaluation.peers.rows import Chosen, Rows, budget, heaviest


def select(options: Channels, rows: Rows, _: torch.Tensor) -> Chosen:
    size = rows.keys.shape[3]
    if options.channels > size:
        raise ValueError(f"peer 'channels': channels {options.channels}, but keys have {size} elements: lower it")
    inside = rows.in_prefix
    keys = rows.keys.masked_fill(~inside[:, None, :, None], 0.0)
    # Sums will do for an order, and what is not there is zero.
    large = keys.abs().sum(2) * rows.query.abs().sum((2, 3))
    chosen = large.topk(options.channels, dim=-1).indices
    few = keys.gather(3, chosen[:, :, None].expand(-1, -1, keys.shape[2], -1))
    query = rows.query.gather(4, chosen[:, :, None, None].expand(*rows.query.shape[:4], -1))
    scores = torch.einsum("vhgqd,vhld->vhgql", query, few) * rows.scale
    kept = heaviest(
        rows.distribution(scores, inside), inside[:, None], budget(options.ratio, rows.prefix)[:, None, None]
    )
    return Chosen(kept, rows.prefix[:, None].expand(kept.shape[:2]))
