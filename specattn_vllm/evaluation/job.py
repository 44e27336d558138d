"""What is measured of one setting, with everything that its figures depend on, as JSON. Loads no torch."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import Field

from specattn_vllm.evaluation.schema import Setting, StrictModel
from specattn_vllm.options import SpecAttnOptions

OTHER_CHUNK = 1000
"""Tokens of a prompt at a time, where batches are to be others than vLLM's own, which are powers of two."""


class Job(StrictModel):
    """Leads a setting's engine through documents, then generates freely from their beginnings."""

    setting: Setting
    target: str
    draft: str
    models: dict[str, dict[str, Any]]
    """What the two are, wherever they lie."""
    draft_tokens: int
    batch: int
    device: Literal["cuda", "cpu"]
    dtype: str
    engine_options: dict[str, Any] = Field(default_factory=dict)
    documents: list[list[int]]
    """Token ids, `text_tokens` of each."""
    context: int
    positions: int
    free_tokens: int

    @property
    def name(self) -> str:
        return self.setting.name

    @property
    def max_model_len(self) -> int:
        return positions_needed(self.context, self.positions, self.draft_tokens, self.free_tokens)

    @property
    def key(self) -> str:
        """Changes with anything that the figures depend on, so that a later run can tell what is measured."""
        text = json.dumps(self.model_dump(mode="json", exclude={"target", "draft"}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def engine_arguments(self) -> dict[str, Any]:
        """Of vllm.LLM."""
        options = SpecAttnOptions.parse(self.setting.options)
        # A batch below the crossover is not pruned; how good pruning is has to be measured below it too.
        always = {"crossover_tokens": 0} if "crossover_tokens" in options.usable else {}
        arguments: dict[str, Any] = {
            "model": self.target,
            "attention_backend": "specattn",
            "additional_config": {"specattn": always | self.setting.options},
            "speculative_config": {
                "model": options.draft_model(self.target, self.draft),
                "method": "draft_model",
                "num_speculative_tokens": self.draft_tokens,
            },
            "dtype": self.dtype,
            "max_num_seqs": self.batch,
            "max_model_len": self.max_model_len,
            # Forcing looks at each step when it is done.
            "async_scheduling": False,
            "distributed_executor_backend": "uni",
            "seed": 0,
        }
        if self.setting.fp8_cache:
            arguments["kv_cache_dtype"] = "fp8"
        if self.device == "cpu":
            arguments |= {"enforce_eager": True, "max_num_batched_tokens": 2048}
        if self.setting.baseline is not None:
            arguments["enforce_eager"] = True  # a baseline waits for the device
        arguments |= self.engine_options
        if self.setting.other_batches:
            fewer = max(1, self.batch // 2)
            rows = fewer * 2 * (self.draft_tokens + 1)  # a round of each, and what drafting takes in beside
            arguments |= {"max_num_seqs": fewer, "max_num_batched_tokens": max(OTHER_CHUNK, rows)}
        return arguments


def verified_tokens(positions: int, draft_tokens: int) -> int:
    """Positions rounded up to whole rounds of K + 1."""
    return -(-positions // (draft_tokens + 1)) * (draft_tokens + 1)


def positions_needed(context: int, positions: int, draft_tokens: int, free_tokens: int) -> int:
    """Positions that an engine needs: of both runs the longer, and room for drafting beyond it."""
    generated = max(1 + verified_tokens(positions, draft_tokens), free_tokens + draft_tokens)
    return context + generated + 2 * (draft_tokens + 1)


def text_tokens(context: int, positions: int, draft_tokens: int) -> int:
    """Tokens a document needs: the prompt, the next one, whole rounds, and the drafts made in the last of them."""
    return context + 1 + verified_tokens(positions, draft_tokens) + draft_tokens
