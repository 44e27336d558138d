"""Selections of the first and the last tokens of the context, without attention: StreamingLLM's window, a baseline."""

from __future__ import annotations

import torch

from specattn_vllm.executors import Operations
from specattn_vllm.selection.choose import Limits, choose


class Window:
    """Selections without attention: the first `sink_tokens`, and the last tokens with the rest of the budget.

    They are made from a mass of zeros. At equal mass, the choice prefers the most recent tokens.
    """

    def __init__(
        self, operations: Operations, limits: Limits, max_num_reqs: int, max_model_len: int, device: torch.device
    ) -> None:
        self.operations = operations
        self.limits = limits
        self.mass = torch.zeros((max_num_reqs, 1, 1, max_model_len), dtype=torch.float32, device=device)
        self.bits = torch.empty((max_num_reqs, 1, 1, -(-max_model_len // 32)), dtype=torch.int32, device=device)
        self.counts = torch.empty((max_num_reqs, 1, 1), dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of each kind of buffer."""
        return {"mass": self.mass.nbytes, "bitmasks": self.bits.nbytes + self.counts.nbytes}

    def select(self, wanted: torch.Tensor, committed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `TargetCapture.select`: bits [R, 1, 1, W] and prefix_lens [R] int32."""
        rows = wanted.shape[0]
        lens = torch.where(wanted, committed, 0)
        bits = self.bits[:rows]
        choose(self.operations, self.limits, self.mass[:rows], lens.view(-1, 1, 1), bits, self.counts[:rows])
        return bits, lens
