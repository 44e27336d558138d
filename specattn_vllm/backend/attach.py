"""The setup of every engine of this backend after vLLM's model runner has loaded its models."""

from __future__ import annotations

from typing import Any

from vllm.utils.import_utils import resolve_obj_by_qualname

from specattn_vllm.metrics import publish
from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.speculation.counting import watch_drafter


def attach(runner: Any) -> None:
    """Join the engine's method to its target, or count the rounds of vLLM's own drafter. Publish the counts as
    metrics."""
    options = SpecAttnOptions.from_vllm(runner.vllm_config)
    if options.kind.attach is None:
        watch_drafter(runner, options)
    else:
        resolve_obj_by_qualname(options.kind.attach)(runner, options)
    publish.start(runner, options)
