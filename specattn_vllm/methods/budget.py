"""Options that say how much of the context the target or its draft model reads. Methods add their own options."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from specattn_vllm.options import SpecAttnOptions, for_researchers

INT32 = 2**31 - 1  # the kernels count tokens in 32 bits


def ratio_field(default: float) -> Any:
    return Field(default, gt=0.0, le=1.0, description="Share of the context that is kept.")


def sparse_draft_field(default: bool) -> Any:
    return Field(
        default,
        description="Whether the steps of a draft model read a part of its context: what its own queries choose in the "
        "first step of a round, over a small copy of its keys.",
    )


class ShareOptions(SpecAttnOptions):
    """A budget that is a fixed share of the context, between a floor and a cap. Counts are in tokens."""

    ratio: float = ratio_field(0.1)
    min_tokens: int = Field(
        128,
        ge=0,
        le=INT32,
        description="Floor on kept tokens, sink and recent ones included; `ratio` and `max_fraction` yield to it.",
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        le=INT32,
        description="Cap on kept tokens, at least `min_tokens` and at least sink and recent tokens together.",
    )
    max_fraction: float = for_researchers(
        1.0,
        gt=0.0,
        le=1.0,
        description="Cap on kept tokens as a share of the request's context; `min_tokens` goes first.",
    )
    sink_tokens: int = for_researchers(
        4, ge=0, le=INT32, description="First tokens of the context that are always kept."
    )
    recent_tokens: int = for_researchers(
        64, ge=0, le=INT32, description="Last tokens of the context that are always kept."
    )
    crossover_tokens: int | None = Field(
        None,
        ge=0,
        le=INT32,
        description="Context tokens of a batch, summed over its requests, below which everything is read, because "
        "choosing would cost more than it saves. Of a lossless method it is drafting that reads everything. Default: "
        "what was measured for the executor, 0 where nothing was.",
    )

    @property
    def fixed_budget(self) -> bool:
        """Whether a fixed share of the context is kept, instead of a share of the attention mass."""
        return True

    @property
    def amount(self) -> str:
        return f"ratio={self.ratio:g}"

    def crossover(self, executor: str) -> int:
        return super().crossover(executor) if self.crossover_tokens is None else self.crossover_tokens

    @model_validator(mode="after")
    def _clamps_agree(self) -> Self:
        if self.max_tokens is None:
            return self
        if self.max_tokens < self.min_tokens:
            raise ValueError(f"max_tokens {self.max_tokens} is below min_tokens {self.min_tokens}: change one")
        if self.max_tokens < self.sink_tokens + self.recent_tokens:
            raise ValueError(
                f"max_tokens {self.max_tokens} is below sink_tokens + recent_tokens "
                f"({self.sink_tokens} + {self.recent_tokens}), which are always kept: raise it or lower those"
            )
        return self


class BudgetOptions(ShareOptions):
    """A budget that is a fixed share of the context, or as many tokens as hold a share of the attention mass."""

    rule: Literal["top_p", "top_k"] | None = Field(
        None,
        description="'top_p': as many tokens as hold `top_p` of the attention mass. 'top_k': a fixed share of the "
        "context, `ratio`. Default: 'top_p' if only `top_p` is given, else 'top_k'.",
    )
    top_p: float = Field(
        0.9,
        gt=0.0,
        le=1.0,
        description="In the place of `ratio`: share of the attention mass on the context that the kept tokens hold. 1 "
        "keeps everything, but for a cap.",
    )

    @property
    def fixed_budget(self) -> bool:
        return "top_p" not in self.model_fields_set if self.rule is None else self.rule == "top_k"

    @property
    def amount(self) -> str:
        return super().amount if self.fixed_budget else f"top_p={self.top_p:g}"

    @model_validator(mode="after")
    def _one_rule_is_meant(self) -> Self:
        if self.rule is None and {"top_p", "ratio"} <= self.model_fields_set:
            raise ValueError(
                f"top_p {self.top_p} and ratio {self.ratio} are of two rules: give one of them, or say which holds "
                "(rule='top_p' or rule='top_k')"
            )
        return self


class AuditedOptions(SpecAttnOptions):
    """Options of methods whose target is sparse."""

    audit_share: float = for_researchers(
        0.0,
        ge=0.0,
        le=1.0,
        description="Share of each step's (layer, request) pairs with a selection that are audited: the target's "
        "attention mass on the selection is measured. An audited pair costs one more pass over the keys.",
    )


class SketchedDraftOptions(BudgetOptions):
    """A budget that a draft model may have too, through a sketch of its keys in the cache."""

    sparse_draft: bool = sparse_draft_field(False)
    draft_ratio: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="With `sparse_draft`, share of the context that the draft's own steps keep. Default: as much as "
        "the other options say.",
    )
    sketch_bits: Literal[1, 2, 4] = for_researchers(
        2, description="Bits of each element of the copy of the keys that is searched."
    )

    @property
    def drafts_by_sketch(self) -> bool:
        return self.sparse_draft

    @property
    def bits_in_cache(self) -> int | None:
        return self.sketch_bits if self.kind.keeps_sketch or self.sparse_draft else None

    @property
    def amount(self) -> str:
        alone = self.kind.lossless and self.draft_ratio is not None
        return f"ratio={self.draft_ratio:g}" if alone else super().amount

    @property
    def goes_with_any_drafter(self) -> bool:
        # The default of sparse_draft suits any drafter; only a user who sets it asks for a draft model.
        return super().goes_with_any_drafter and not (self.sparse_draft and "sparse_draft" in self.model_fields_set)

    @model_validator(mode="after")
    def _a_draft_s_ratio_has_a_draft_that_reads_a_part(self) -> Self:
        if self.draft_ratio is not None and not self.sparse_draft:
            raise ValueError(
                f"draft_ratio {self.draft_ratio:g} without sparse_draft, where every draft step reads everything: set "
                "sparse_draft=true, or leave draft_ratio out"
            )
        return self
