"""What would be accepted of drafts along the text: of each round, from the distributions of target and draft.

A draft x ~ q is accepted with probability min(1, p(x) / q(x)), that is, over all x, with sum_x min(p(x), q(x))
(Leviathan et al., ICML 2023, arXiv 2211.17192). Both are taken after the same tokens of the text: p as the target gives
it in its verification, pruned where it prunes, and q as drafting gives it, at each of a round's K drafts. With a_j for
the j-th,

    tokens of a round = 1 + a_1 + a_1 a_2 + ... + a_1 ... a_K

and likewise for greedy decoding, where a_j is 1 if both find the same token most likely, else 0. The drafts before the
j-th are the text's, not the draft's own. So the text is the same for all settings, which text that a model writes
itself is not, and a target that repeats itself earns nothing.
"""

from __future__ import annotations

import torch

from specattn_vllm.evaluation.results import DraftResult


class Acceptance:
    """a_j of each round of each document."""

    def __init__(self, documents: int) -> None:
        self._rounds: list[list[torch.Tensor]] = [[] for _ in range(documents)]

    def add(self, document: int, target: torch.Tensor, draft: torch.Tensor) -> None:
        """A round: logits [K, vocabulary] of both, for the same K tokens."""
        # The draft's vocabulary may be padded to another size; what one of the two does not know is never accepted.
        size = min(target.shape[1], draft.shape[1])
        p, q = target.double().softmax(-1)[:, :size], draft.double().softmax(-1)[:, :size]
        same = target.argmax(-1) == draft.argmax(-1)
        self._rounds[document].append(torch.stack((torch.minimum(p, q).sum(-1), same.double())).cpu())

    def results(self) -> list[DraftResult]:
        """Of each document, all of which have rounds."""
        found = []
        for rounds in self._rounds:
            each = torch.stack(rounds)  # [rounds, by sampling and greedily, K]
            tokens, greedy_tokens = (1 + each.cumprod(-1).sum(-1)).mean(0).tolist()
            accepted, agreed = each.mean(0).tolist()
            of = {"tokens": tokens, "greedy_tokens": greedy_tokens, "accepted": accepted, "agreed": agreed}
            found.append(DraftResult(rounds=len(rounds), **of))
        return found
