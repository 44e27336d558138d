"""What methods share whose target drafts for itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from specattn_vllm.methods.refusals import another_drafter, capped_logits, other_layers
from specattn_vllm.options import SINKS, SOFT_CAP, SpecAttnOptions

# An estimate, not measured: below this, even a draft step that read no KV entry would save only a thirtieth of the
# bytes that a step of an 8B model reads.
CROSSOVER = {"fa3": 4096}
DRAFT_LENGTH = 6
"""It is larger than for a small draft model, because nearly all of these drafts are accepted. Vegas drafts 5 to 9
(arXiv 2602.07223)."""


class SelfDraftOptions(SpecAttnOptions):
    """Options of a method whose target drafts for itself."""

    @property
    def sparse_readers(self) -> tuple[str, ...]:
        return ("drafting",)

    @property
    def cannot_have(self) -> tuple[str, ...]:
        return SINKS, SOFT_CAP  # what captures scores attends without them

    def draft_model(self, target: str, given: str | None) -> str | None:
        return target

    def refusals(self, config: Any) -> Iterator[str]:
        yield from other_layers(config, self.method)
        yield from capped_logits(config, f"method {self.method!r}", "use method 'sketch' or 'dense'")
        yield from another_drafter(config, f"method = {self.method!r}")
        spec = config.speculative_config
        if spec is None:
            yield f"method = {self.method!r} without speculation: give --num-speculative-tokens K"
        elif spec.uses_draft_model() and spec.draft_model_config.model != config.model_config.model:
            yield (
                f"method = {self.method!r} with --speculative-model {spec.draft_model_config.model}: the target drafts "
                "for itself and loads no draft model; leave --speculative-model out, or set method='specattn'"
            )
        if config.lora_config is not None:
            yield (
                f"LoRA with method = {self.method!r}: vLLM chooses adapters for the rows of a verification, not for "
                "those of the target's own drafts; serve merged weights, or set method='sketch'"
            )
        if config.parallel_config.enable_eplb:
            yield f"method = {self.method!r} with enable_eplb: one model would be registered twice; turn EPLB off"
