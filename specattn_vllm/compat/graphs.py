"""Two full CUDA graphs of the target for each batch size: one with a search, and one without."""

from __future__ import annotations

from typing import Any

from specattn_vllm.compat.patching import patched


def capture_twice(model: Any, target: Any) -> None:
    """Make vLLM capture its full CUDA graphs of `model` twice, with target.captured true and false, and replay those
    that match target.chooses. vLLM makes one graph manager for profiling and then the final one, both after this call.

    A step in which no row chooses (a batch below the crossover, exact requests) needs no search. A search would cost a
    small batch up to a tenth of its time. Remove when a backend may add its own key to graphs.
    """
    model.specattn_target = target
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

    @patched(ModelCudaGraphManager, "capture")
    def capture(original, self, model: Any, *args: Any, **kwargs: Any) -> None:
        self.specattn_target = target = getattr(model, "specattn_target", None)
        if target is None:
            return original(self, model, *args, **kwargs)
        graphs, wanted, samples = self.graphs, self._capture_descs, self._capture_mem_samples
        try:
            target.captured = True
            original(self, model, *args, **kwargs)
            first = len(samples or ())
            target.captured = False
            self.graphs = self.specattn_dense_graphs = {}
            self._capture_descs = {mode: descs for mode, descs in wanted.items() if mode.name == "FULL"}
            original(self, model, *args, **kwargs)
        finally:
            self.graphs, self._capture_descs, target.captured = graphs, wanted, None
        if samples is not None:
            # vLLM estimates memory per batch size, at least a MiB for each graph: here a size counts both graphs.
            pairs = zip(samples[:first], samples[first:], strict=True)
            samples[:] = [sum(pair) if n == 0 else sum(max(x, 1 << 20) for x in pair) for n, pair in enumerate(pairs)]

    @patched(ModelCudaGraphManager, "run_fullgraph")
    def run_fullgraph(original, self, desc: Any) -> Any:
        target = getattr(self, "specattn_target", None)
        if target is None or target.chooses:
            return original(self, desc)
        graphs, self.graphs = self.graphs, self.specattn_dense_graphs
        try:
            return original(self, desc)
        finally:
            self.graphs = graphs
