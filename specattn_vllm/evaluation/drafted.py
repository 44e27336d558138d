"""The draft's logits of each slot's last round, kept until the target has verified its drafts."""

from __future__ import annotations

import torch

NOWHERE = -1


class DraftedElsewhereError(RuntimeError):
    """What was kept is not of the positions that were verified."""


class Drafted:
    """For `slots` requests at a time.

    logits  [slots + 1, K, vocabulary], and the positions that they were made at, [slots + 1, K] int64. The last slot is
            nobody's: rows that only fill a graph's batch have slot -1.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._logits: torch.Tensor | None = None
        self._positions: torch.Tensor | None = None

    def keep(
        self, logits: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, step: torch.Tensor, steps: int
    ) -> None:
        """Of one draft step, logits [R, vocabulary] made at positions [R] for slots [R]; `step`, of `steps`, is a
        number on the device. Runs inside CUDA graphs."""
        if self._logits is None:
            # The first is a dummy run of vLLM's, before any graph, and before it measures what is left for the cache.
            shape = (self._slots + 1, steps)
            self._logits = torch.zeros((*shape, logits.shape[1]), dtype=logits.dtype, device=logits.device)
            self._positions = torch.full(shape, NOWHERE, dtype=torch.int64, device=logits.device)
        at = slots, step.reshape(1).expand(slots.shape[0])  # a number by itself would be brought to the host
        self._logits[at] = logits
        self._positions[at] = positions

    def round_of(self, slot: int, positions: torch.Tensor) -> torch.Tensor | None:
        """[K, vocabulary], for the tokens after all but the last of `positions` [n], at which a slot's request was
        verified; None where these are no round, with K drafts."""
        if self._logits is None or len(positions) != self._logits.shape[1] + 1:
            return None
        if not torch.equal(self._positions[slot], positions[:-1]):
            raise DraftedElsewhereError(
                f"drafts were made at positions {self._positions[slot].tolist()}, and verified at {positions.tolist()}"
            )
        return self._logits[slot]
