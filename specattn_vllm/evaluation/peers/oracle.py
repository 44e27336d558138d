"""The target's own attention in the very rows that are verified, averaged over rows and query heads."""

from __future__ import annotations

import torch

from specattn_vllm.evaluation.peer_options import Oracle
from specattn_vllm.evaluation.peers.rows import Chosen, Rows, budget, heaviest


def select(options: Oracle, rows: Rows, logits: torch.Tensor) -> Chosen:
    """What finding them reads is not counted."""
    inside = rows.in_prefix[:, None]
    mass = rows.mean(logits.softmax(-1)).masked_fill_(~inside, 0.0)
    if options.shared:
        mass = mass.mean(1, keepdim=True)
    if options.ratio is not None:
        wanted = budget(options.ratio, rows.prefix)[:, None, None]
    else:
        ordered = mass.double().sort(-1, descending=True).values
        before = ordered.cumsum(-1) - ordered
        # Shares of the prefix's mass, as in our top-p; what the rows give each other is kept anyway.
        wanted = (before < options.top_p * ordered.sum(-1, keepdim=True)).sum(-1, keepdim=True)
        wanted = wanted.minimum(rows.prefix[:, None, None])
    kept = heaviest(mass, inside, wanted).expand(-1, rows.keys.shape[1], -1)
    return Chosen(kept, torch.zeros(kept.shape[:2], dtype=torch.int64, device=kept.device))
