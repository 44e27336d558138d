"""The target's own queries choose the tokens that they read, over a small copy of its keys (docs/sketch.md)."""

from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from specattn_vllm.methods.base import Method
from specattn_vllm.methods.budget import AuditedOptions, SketchedDraftOptions, ratio_field, sparse_draft_field
from specattn_vllm.methods.refusals import capped_logits
from specattn_vllm.options import SOFT_CAP, for_researchers


class SketchOptions(SketchedDraftOptions, AuditedOptions):
    """The budget, how the KV heads share it, and the bits of the sketch."""

    ratio: float = ratio_field(0.125)
    sparse_draft: bool = sparse_draft_field(True)
    shared_budget: Literal["layers", "heads", "none"] = for_researchers(
        "layers",
        description="Which KV heads share one budget: `ratio` is then their mean, and one head may read more than "
        "another. 'layers': the heads of all layers, by the score threshold that would have met the budget in the "
        "request's last sparse step. 'heads': the heads of each layer. 'none': every head reads the same amount. Not "
        "with `top_p`.",
    )
    epsilon: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="A guarantee: the most attention mass that a KV head may leave unread, for each query row. It is "
        "checked by a sample of the unread tokens. A head that may lose more reads everything, in the same step.",
    )
    delta: float = for_researchers(
        0.05,
        gt=0.0,
        lt=0.5,
        description="With `epsilon`: how often a row may lose more than `epsilon` without being noticed, at most.",
    )
    draws: Literal[32, 64, 128, 256] = for_researchers(
        64, description="With `epsilon`: unread tokens that are drawn for each KV head."
    )

    @property
    def heads_share(self) -> Literal["layers", "heads", "none"]:
        return self.shared_budget

    @property
    def searched_bits(self) -> int:
        return self.sketch_bits

    @property
    def cannot_have(self) -> tuple[str, ...]:
        # Both weigh tokens without it. The order of a head's tokens is the same, so a fixed share may have it.
        return (SOFT_CAP,) if self.epsilon is not None or not self.fixed_budget else ()

    def refusals(self, config: Any) -> Iterator[str]:
        yield from super().refusals(config)
        if self.epsilon is not None:
            yield from capped_logits(config, "epsilon", "leave it out")
        if not self.fixed_budget:
            yield from capped_logits(config, "top_p, a share of the attention mass", "set ratio in its place")

    @model_validator(mode="after")
    def _what_is_shared_is_a_fixed_share(self) -> Self:
        if "shared_budget" in self.model_fields_set and not self.fixed_budget:
            raise ValueError(
                f"shared_budget {self.shared_budget!r} with a share of the attention (top_p), which each KV head meets "
                "by itself: set ratio in the place of top_p, or leave shared_budget out"
            )
        return self

    @model_validator(mode="after")
    def _a_guarantee_has_its_limit(self) -> Self:
        given = [f"{name} {getattr(self, name)}" for name in ("delta", "draws") if name in self.model_fields_set]
        if given and self.epsilon is None:
            raise ValueError(f"{' and '.join(given)} without epsilon, the mass that may be lost: set epsilon too")
        if self.epsilon is not None and self.executor == "fa3":
            raise ValueError(
                f"epsilon {self.epsilon} with executor 'fa3', whose sparse attention cannot leave out heads: use "
                "'auto' or 'triton'"
            )
        return self


METHOD = Method(
    name="sketch",
    summary="the target's own queries choose what they read, over a small copy of its keys (approximate)",
    target_reads="own choice",
    options=SketchOptions,
    per_head=True,
    # H200, Llama-8B shape, bf16, no speculation, 2026-11-28 (docs/results/h200-sketch-alone.json): 16 requests of 4k,
    # 65,536 tokens together, take 6.75 ms instead of 7.01. Smaller batches were not measured with a search.
    crossover={"fa3": 65536},
    paper="it is this package's own",
    attach="specattn_vllm.sketch.attach.attach",
)
