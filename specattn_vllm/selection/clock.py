"""How long a device takes to choose."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from specattn_vllm.executors import Operations


class Clock:
    """A context manager that adds the time of what runs in it to a total. On a GPU it is two small kernels. All that
    passes between them is included; outside of CUDA graphs, that is also waiting for the host's launches. The host does
    not wait, so it works in a captured CUDA graph too."""

    def __init__(self, operations: Operations, total: torch.Tensor, times: int = 1) -> None:
        """total: [1] int64, nanoseconds, on the device. times: how often what is measured takes place in a step: of
        layers that do the same, one is measured."""
        self._operations, self._total, self._times = operations, total, times
        self._began = torch.zeros_like(total)

    def __enter__(self) -> None:
        self._operations.start_clock(self._began)

    def __exit__(self, *failed: object) -> None:
        self._operations.stop_clock(self._began, self._times, self._total)
