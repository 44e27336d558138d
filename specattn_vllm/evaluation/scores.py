"""The target's logits to figures per position: loss, KL divergence from the dense run, top-1 agreement; and with the
draft's, what would be accepted along the text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from specattn_vllm.evaluation.results import DraftResult


class Scores:
    """Figures of one forced run, [documents, positions] each; NaN where nothing was scored yet.

    The dense run's distributions lie in a folder, since a large vocabulary's do not fit into memory: the dense run
    writes them, the others read them. logprobs [documents, positions, vocabulary] float16, best [documents, positions]
    int32. Half precision moves a log-probability by 0.05% of itself; distributions are normalised again when they are
    read, which leaves some 1e-6 of KL. The most likely tokens are kept beside, because rounding makes ties.
    """

    def __init__(self, documents: int, positions: int, reference: Path, *, write: bool) -> None:
        shape = (documents, positions)
        self.nll = np.full(shape, np.nan)
        """Nats per token of the text."""
        self.kl = np.full(shape, np.nan)
        """Nats, from the dense run's distribution to this one's."""
        self.agrees = np.zeros(shape, dtype=bool)
        """Whether the most likely token is the dense run's."""
        self._folder, self._writes = reference, write
        self._logprobs = self._best = None

    def _array(self, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        path = self._folder / f"{name}.npy"
        if self._writes:
            return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        found = np.load(path, mmap_mode="r")
        if found.shape != shape:
            raise ValueError(f"{path} holds {found.shape}, wanted {shape}: it is of another evaluation")
        return found

    def add(self, document: int, first: int, following: torch.Tensor, logits: torch.Tensor) -> int:
        """Score positions first.. of a document, those past the last left out; returns how many.

        following [n] int64, the text's tokens; logits [n, vocabulary] for them.
        """
        count = min(logits.shape[0], self.nll.shape[1] - first)
        if count <= 0:
            return 0
        if self._logprobs is None:
            self._logprobs = self._array("logprobs", (*self.nll.shape, logits.shape[1]), np.float16)
            self._best = self._array("best", self.nll.shape, np.int32)
        # Small divergences are differences of large sums.
        logprobs, best = logits[:count].double().log_softmax(-1), logits[:count].argmax(-1).cpu().numpy()
        at = document, slice(first, first + count)
        if self._writes:
            self._logprobs[at], self._best[at] = logprobs.half().cpu().numpy(), best
        dense = torch.from_numpy(np.array(self._logprobs[at])).to(logprobs.device).double().log_softmax(-1)
        self.nll[at] = -logprobs.gather(1, following[:count, None])[:, 0].cpu().numpy()
        self.kl[at] = kl_divergence(dense, logprobs).cpu().numpy()
        self.agrees[at] = self._best[at] == best
        return count

    def means(self) -> list[tuple[float, float, float]]:
        """Of each document: loss, KL, agreement."""
        return [tuple(column.mean() for column in of) for of in zip(self.nll, self.kl, self.agrees, strict=True)]

    def close(self) -> None:
        """Everything that was written is on disk."""
        if self._writes and self._logprobs is not None:
            self._logprobs.flush()
            self._best.flush()
        self._logprobs = self._best = None


def kl_divergence(dense: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(dense || other) [n] in nats, of log-probabilities [n, vocabulary]."""
    # Where the dense run gives no probability at all, -inf, there is nothing to sum.
    terms = dense.exp() * (dense - other)
    return torch.where(dense.isneginf(), 0.0, terms).sum(-1)


class Acceptance:
    """What would be accepted of drafts along the text: of each round, from the distributions of target and draft.

    A draft x ~ q is accepted with probability min(1, p(x) / q(x)), that is, over all x, with sum_x min(p(x), q(x))
    (Leviathan et al., ICML 2023, arXiv 2211.17192). Both are taken after the same tokens of the text: p as the target
    gives it in its verification, pruned where it prunes, and q as drafting gives it, at each of a round's K drafts.
    With a_j for the j-th,

        tokens of a round = 1 + a_1 + a_1 a_2 + ... + a_1 ... a_K

    and likewise for greedy decoding, where a_j is 1 if both find the same token most likely, else 0. The text is the
    same for all settings, and a target that repeats itself earns nothing by it.
    """

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
