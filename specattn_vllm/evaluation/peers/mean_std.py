"""Pages by the mean and the standard deviation of their keys.

    score(q, page) = scale * (q . mean + spread * |q| . std)

What Quest's bound is with the middle of a page's keys and half of their range, this is with their mean and their
standard deviation (of the page's tokens, not a sample's): as much to read, and a single token moves it less. The first
page is always read: what all queries attend to there is a token or two, which a mean does not show.
"""

from __future__ import annotations

import torch

from specattn_vllm.evaluation.peer_options import MeanStd
from specattn_vllm.evaluation.peers.pages import Pages
from specattn_vllm.evaluation.peers.rows import Chosen, Rows


def select(options: MeanStd, rows: Rows, _: torch.Tensor) -> Chosen:
    pages = Pages.of(rows, options.page_size)
    keys, tokens = pages.keys.masked_fill(~pages.there, 0.0), pages.there.sum(3).clamp(min=1)
    mean = keys.sum(3) / tokens
    apart = (keys - mean.unsqueeze(3)).masked_fill(~pages.there, 0.0)
    std = (apart.square().sum(3) / tokens).sqrt()
    scores = torch.einsum("vhgqd,vhpd->vhgqp", rows.query, mean)
    scores += options.spread * torch.einsum("vhgqd,vhpd->vhgqp", rows.query.abs(), std)
    return pages.choose(rows, scores * rows.scale, options.ratio, first=True)
