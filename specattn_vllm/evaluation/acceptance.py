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
    """Sums over the rounds of each document."""

    def __init__(self, documents: int, draft_tokens: int) -> None:
        self.rounds = [0] * documents
        self.tokens = torch.zeros(documents, 2, dtype=torch.float64)
        """That a round gives, by sampling and greedily, summed over rounds."""
        self.accepted = torch.zeros(documents, 2, draft_tokens, dtype=torch.float64)
        """a_j, likewise."""

    def add(self, document: int, target: torch.Tensor, draft: torch.Tensor) -> None:
        """A round: logits [K, vocabulary] of both, for the same K tokens."""
        # The draft's vocabulary may be padded to another size; what one of the two does not know is never accepted.
        size = min(target.shape[1], draft.shape[1])
        p, q = target.double().softmax(-1)[:, :size], draft.double().softmax(-1)[:, :size]
        same = target.argmax(-1) == draft.argmax(-1)
        accepted = torch.stack((torch.minimum(p, q).sum(-1), same.double())).cpu()
        self.rounds[document] += 1
        self.tokens[document] += 1 + accepted.cumprod(-1).sum(-1)
        self.accepted[document] += accepted

    def results(self) -> list[DraftResult | None]:
        """Of each document; None where no round was verified."""
        found = []
        for rounds, tokens, accepted in zip(self.rounds, self.tokens, self.accepted, strict=True):
            if rounds:
                (tokens, greedy_tokens), (accepted, agreed) = (tokens / rounds).tolist(), (accepted / rounds).tolist()
                of = {"tokens": tokens, "greedy_tokens": greedy_tokens, "accepted": accepted, "agreed": agreed}
                found.append(DraftResult(rounds=rounds, **of))
            else:
                found.append(None)
        return found
