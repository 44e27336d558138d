"""Quest (Tang et al., ICML 2024, arXiv 2406.10774): pages by an upper bound of their scores.

score(q, page) = scale * sum_d max(q_d least_d, q_d largest_d)
"""

from __future__ import annotations

import torch

from specattn_vllm.evaluation.peer_options import Quest
from specattn_vllm.evaluation.peers.pages import Pages
from specattn_vllm.evaluation.peers.rows import Chosen, Rows


def select(options: Quest, rows: Rows, _: torch.Tensor) -> Chosen:
    pages = Pages.of(rows, options.page_size)
    least = pages.keys.masked_fill(~pages.there, torch.inf).amin(3)
    largest = pages.keys.masked_fill(~pages.there, -torch.inf).amax(3)
    # Zero times infinity would be no number.
    least, largest = (bound.masked_fill(~pages.used[:, None, :, None], 0.0) for bound in (least, largest))
    above = torch.einsum("vhgqd,vhpd->vhgqp", rows.query.clamp(min=0), largest)
    bounds = (above + torch.einsum("vhgqd,vhpd->vhgqp", rows.query.clamp(max=0), least)) * rows.scale
    return pages.choose(rows, bounds, options.ratio)
