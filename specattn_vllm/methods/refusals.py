"""Reasons to refuse an engine that several methods share, each with its remedy. config: vLLM's configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from specattn_vllm.layer_kinds import has_others, others, soft_cap
from specattn_vllm.options import SOFT_CAP


def nothing_more(config: Any, options: Any) -> None:
    """The check of a method whose options refuse all that it cannot serve."""


def another_drafter(config: Any, asks: str) -> Iterator[str]:
    """For what needs a separate draft model: a drafter that is none. asks: what needs it."""
    spec = config.speculative_config
    if spec is not None and not spec.uses_draft_model():
        yield (
            f"speculative method {spec.method!r}: a separate draft model is needed (--spec-method draft_model) for "
            f"{asks}; methods 'sketch' and 'dense' without sparse_draft go with any drafter; vLLM guesses the method "
            "from the path, so a folder named after eagle, dflash or dspark has to be renamed"
        )


def other_layers(config: Any, method: str) -> Iterator[str]:
    """For methods that need one kind of layers: a target with layers that do not see all of the context."""
    model = config.model_config
    if has_others(model):
        yield (
            f"target: layers with {others(model)} are not supported by method {method!r}; use method 'sketch' or "
            "'dense'"
        )


def capped_logits(config: Any, asks: str, remedy: str) -> Iterator[str]:
    """For what weighs tokens without the target's soft cap. asks: what does so."""
    if soft_cap(config.model_config) is not None:
        yield f"target: {SOFT_CAP} is not supported by {asks}; {remedy}"


def large_heads_in_float32(config: Any) -> Iterator[str]:
    """For methods that keep sketches in the cache: what writes them multiplies keys with a matrix in shared memory."""
    if str(config.model_config.dtype) != "torch.float32" or config.device_config.device_type != "cuda":
        return
    spec = config.speculative_config
    models = [config.model_config, *([spec.draft_model_config] if spec is not None and spec.uses_draft_model() else [])]
    if (size := max(model.get_head_size() for model in models)) > 128:
        yield (
            f"--dtype float32 with heads of {size}: a GPU's shared memory has no room for the sketch's rotation in "
            "float32; use --dtype bfloat16"
        )


def unequal_pages(config: Any) -> Iterator[str]:
    """For methods that keep sketches in the cache: a target with layers of two kinds and a drafter with other KV heads.
    vLLM cannot make the pages of their caches equally large then."""
    target, spec = config.model_config, config.speculative_config
    draft = None if spec is None else spec.draft_model_config
    # For n-gram drafting, vLLM sets draft_model_config to the target's config.
    if draft in (None, target) or not has_others(target):
        return
    ours, theirs = ((m.get_total_num_kv_heads(), m.get_head_size()) for m in (target, draft))
    if ours != theirs:
        yield (
            f"a target with {others(target)} and {ours[0]} KV heads of {ours[1]} beside a drafter with "
            f"{theirs[0]} of {theirs[1]}: use a drafter with the target's KV heads, or none"
        )
