"""Two full CUDA graphs of the target for each batch size: one with a search, and one without."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from specattn_vllm.compat.names import MARK


def capture_twice(model: Any, target: Any) -> None:
    """Make vLLM capture its full CUDA graphs of `model` twice, with target.captured true and false, and replay those
    that match target.chooses. vLLM makes one graph manager for profiling and then the final one, both after this call.
    """
    model.specattn_target = target
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

    capture, run = ModelCudaGraphManager.capture, ModelCudaGraphManager.run_fullgraph
    if getattr(capture, MARK, False):
        return

    @functools.wraps(capture)
    def capture_both(self, model: Any, *args: Any, **kwargs: Any) -> None:
        self.specattn_target = target = getattr(model, "specattn_target", None)
        if target is None:
            return capture(self, model, *args, **kwargs)
        with _captured(target, True):
            capture(self, model, *args, **kwargs)
        samples = self._capture_mem_samples
        before = list(samples or ())
        graphs, wanted = self.graphs, self._capture_descs
        self.graphs = self.specattn_dense_graphs = {}
        self._capture_descs = {mode: descs for mode, descs in wanted.items() if mode.name == "FULL"}
        try:
            with _captured(target, False):
                capture(self, model, *args, **kwargs)
        finally:
            self.graphs, self._capture_descs = graphs, wanted
        if samples is not None:
            # vLLM estimates memory per batch size, at least a MiB for each graph: here a size counts both graphs.
            pairs = zip(before, samples[len(before) :], strict=True)
            samples[:] = [sum(pair) if n == 0 else sum(max(x, 1 << 20) for x in pair) for n, pair in enumerate(pairs)]

    @functools.wraps(run)
    def run_fullgraph(self, desc: Any) -> Any:
        target = getattr(self, "specattn_target", None)
        if target is None or target.chooses:
            return run(self, desc)
        graphs, self.graphs = self.graphs, self.specattn_dense_graphs
        try:
            return run(self, desc)
        finally:
            self.graphs = graphs

    setattr(capture_both, MARK, True)
    ModelCudaGraphManager.capture, ModelCudaGraphManager.run_fullgraph = capture_both, run_fullgraph


@contextmanager
def _captured(target: Any, chooses: bool) -> Iterator[None]:
    target.captured = chooses
    try:
        yield
    finally:
        target.captured = None
