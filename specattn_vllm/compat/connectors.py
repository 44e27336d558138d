"""KV connectors: parts of vLLM that bring blocks of the KV cache from elsewhere, and take them there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from specattn_vllm.compat.patching import patched

CONNECTORS = ("OffloadingConnector", "SimpleCPUOffloadConnector", "ExampleConnector")
"""vLLM's names of those that have filled all of a step's blocks before its first layer runs, and need no other layout
of the cache. Connectors that fill the cache layer by layer, or from other machines, were not tried."""


def after_loads(runner: Any, act: Callable[[Sequence[Sequence[int]], int], None]) -> None:
    """Call act(block ids of each KV-cache group, tokens) for each new or resumed request whose first `tokens` tokens
    are in the cache already, before the step's first layer runs. A worker is not told which of these a connector has
    just brought. Remove when vLLM tells a backend which blocks were filled without it."""

    @patched(runner, "initialize_kv_cache")
    def initialize_kv_cache(original, *args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        if not hasattr(runner.kv_connector, "kv_connector"):
            return made  # vLLM profiles memory, with a connector that does nothing

        @patched(runner.kv_connector, "pre_forward")
        def pre_forward(original, scheduler_output: Any, *args: Any, **kwargs: Any) -> None:
            original(scheduler_output, *args, **kwargs)
            for request in scheduler_output.scheduled_new_reqs:
                if request.num_computed_tokens:
                    act(request.block_ids, request.num_computed_tokens)

        return made
