"""The target's logits to figures per position: loss, KL divergence from the dense run, top-1 agreement."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch


class Reference:
    """The dense run's distributions, on disk: a large vocabulary's do not fit into memory.

    logprobs [documents, positions, vocabulary] float16, best [documents, positions] int32. Half precision moves a
    log-probability by 0.05% of itself; distributions are normalised again when they are read, which leaves some 1e-6 of
    KL. The most likely tokens are kept beside, because rounding makes ties.
    """

    def __init__(self, folder: Path, *, write: bool) -> None:
        self.folder = folder
        self.writes = write
        self._logprobs: np.ndarray | None = None
        self._best: np.ndarray | None = None

    def _open(self, documents: int, positions: int, vocabulary: int) -> None:
        if self._logprobs is not None:
            return
        shape = (documents, positions)
        arrays = {"logprobs": ((*shape, vocabulary), np.float16), "best": (shape, np.int32)}
        opened = {}
        for name, (wanted, dtype) in arrays.items():
            path = self.folder / f"{name}.npy"
            if self.writes:
                opened[name] = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=wanted)
            else:
                opened[name] = np.load(path, mmap_mode="r")
            if opened[name].shape != wanted:
                raise ValueError(f"{path} holds {opened[name].shape}, wanted {wanted}: it is of another evaluation")
        self._logprobs, self._best = opened["logprobs"], opened["best"]

    def compare(self, scores: Scores, document: int, first: int, logprobs: torch.Tensor, best: torch.Tensor) -> None:
        """Fill in KL and agreement of positions first.. of a document; logprobs [n, vocabulary] float64, best [n]."""
        self._open(*scores.nll.shape, logprobs.shape[1])
        span = slice(first, first + logprobs.shape[0])
        own = best.cpu().numpy()
        if self.writes:
            self._logprobs[document, span] = logprobs.half().cpu().numpy()
            self._best[document, span] = own
        dense = torch.from_numpy(np.array(self._logprobs[document, span])).to(logprobs.device).double()
        dense = dense - dense.logsumexp(-1, keepdim=True)
        scores.kl[document, span] = kl_divergence(dense, logprobs).cpu().numpy()
        scores.agrees[document, span] = self._best[document, span] == own

    def close(self) -> None:
        """Everything that was written is on disk."""
        if self.writes and self._logprobs is not None:
            self._logprobs.flush()
            self._best.flush()
        self._logprobs = self._best = None


class Scores:
    """Figures of one forced run, [documents, positions] each; NaN where nothing was scored yet."""

    def __init__(self, documents: int, positions: int, reference: Reference) -> None:
        shape = (documents, positions)
        self.nll = np.full(shape, np.nan)
        """Nats per token of the text."""
        self.kl = np.full(shape, np.nan)
        """Nats, from the dense run's distribution to this one's."""
        self.agrees = np.zeros(shape, dtype=bool)
        """Whether the most likely token is the dense run's."""
        self.seen = np.zeros(shape, dtype=bool)
        """Whether a position was scored."""
        self.reference = reference

    def add(self, document: int, first: int, following: torch.Tensor, logits: torch.Tensor) -> int:
        """Score positions first.. of a document, those past the last left out; returns how many.

        following [n] int64, the text's tokens; logits [n, vocabulary] for them.
        """
        count = min(logits.shape[0], self.nll.shape[1] - first)
        if count <= 0:
            return 0
        # Small divergences are differences of large sums.
        logprobs = logits[:count].double().log_softmax(-1)
        chosen = logprobs.gather(1, following[:count, None])[:, 0]
        self.seen[document, first : first + count] = True
        self.nll[document, first : first + count] = -chosen.cpu().numpy()
        self.reference.compare(self, document, first, logprobs, logits[:count].argmax(-1))
        return count


def kl_divergence(dense: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(dense || other) [n] in nats, of log-probabilities [n, vocabulary]."""
    # Where the dense run gives no probability at all, -inf, there is nothing to sum.
    terms = dense.exp() * (dense - other)
    return torch.where(dense.isneginf(), 0.0, terms).sum(-1)
