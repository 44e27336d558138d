"""Blocks of the KV cache that vLLM fills without running the model: by a KV connector, or as copies of other blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from specattn_vllm.compat.patching import patched

CONNECTORS = ("OffloadingConnector", "SimpleCPUOffloadConnector", "ExampleConnector")
"""vLLM's names of those that have filled all of a step's blocks before its first layer runs. Connectors that fill the
cache layer by layer, or from other machines, were not tried."""

NULL_BLOCK = 0
"""vLLM's block that belongs to no request."""


def after_filled(runner: Any, act: Callable[[Sequence[Sequence[int]], int], None]) -> None:
    """Call act(block ids of each KV-cache group, tokens) for each new or resumed request whose first `tokens` tokens
    are in the cache already, before the step's first layer runs, where some of them may have come there without it: in
    all steps with a KV connector, and in steps with copies. vLLM copies a block that two prompts of a hybrid share in
    part, keys and values alone. A worker is not told which of a request's blocks were filled in these ways. Remove when
    vLLM tells a backend."""
    connects = runner.vllm_config.kv_transfer_config is not None
    if not connects and not runner.model_config.is_hybrid:
        return

    def tell(scheduler_output: Any) -> None:
        for request in scheduler_output.scheduled_new_reqs:
            if request.num_computed_tokens:
                act(request.block_ids, request.num_computed_tokens)

    @patched(runner, "initialize_kv_cache")
    def initialize_kv_cache(original, *args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        if hasattr(runner.kv_connector, "kv_connector"):  # vLLM profiles memory with one that does nothing
            # Compiles what writes codes: where nobody reads, and before somebody waits for it.
            act([[NULL_BLOCK]] * len(runner.kv_cache_config.kv_cache_groups), 1)

            @patched(runner.kv_connector, "pre_forward")
            def pre_forward(original, scheduler_output: Any, *args: Any, **kwargs: Any) -> None:
                original(scheduler_output, *args, **kwargs)
                tell(scheduler_output)

        return made

    @patched(runner, "update_requests")
    def update_requests(original, scheduler_output: Any) -> None:
        original(scheduler_output)
        if scheduler_output.kv_cache_block_copies:
            tell(scheduler_output)
