"""The setup of every engine of this backend after vLLM's model runner has loaded its models."""

from __future__ import annotations

from typing import Any

from vllm.utils.import_utils import resolve_obj_by_qualname

from specattn_vllm import compat
from specattn_vllm.backend import filled
from specattn_vllm.metrics import publish
from specattn_vllm.options import SpecAttnOptions


def attach(runner: Any) -> None:
    """Join the engine's method to its target, and publish the counts as metrics."""
    options = SpecAttnOptions.from_vllm(runner.vllm_config)
    compat.name_rows(runner)
    resolve_obj_by_qualname(options.kind.attach)(runner, options)
    filled.watch(runner)
    publish.start(runner, options)
