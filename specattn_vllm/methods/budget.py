"""Options that say how much of the context the target or its draft model reads. Methods add their own options."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from specattn_vllm.methods.refusals import another_drafter, large_heads_in_float32, unequal_pages
from specattn_vllm.options import SpecAttnOptions, for_researchers

SKETCH_SPECULATOR = "specattn_vllm.speculation.sketch_speculator.SketchSpeculator"
INT32 = 2**31 - 1  # the kernels count tokens in 32 bits


def ratio_field(default: float) -> Any:
    return Field(default, gt=0.0, le=1.0, description="The budget: share of the context's tokens that are read.")


def sparse_draft_field(default: bool) -> Any:
    return Field(
        default,
        description="Whether a draft model reads only a part of its context, too. The queries of its first step in a "
        "round select the tokens, by a sketch of the draft's keys; the other steps of the round read the same tokens.",
    )


class ShareOptions(SpecAttnOptions):
    """A budget that is a fixed share of the context, between a floor and a cap. Counts are in tokens."""

    ratio: float = ratio_field(0.1)
    min_tokens: int = Field(
        128,
        ge=0,
        le=INT32,
        description="Lower limit of the budget, in tokens, with sink and recent tokens. It takes precedence over "
        "`ratio` and `max_fraction`.",
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        le=INT32,
        description="Upper limit of the budget, in tokens. It must be at least `min_tokens`, and at least "
        "`sink_tokens` plus `recent_tokens`.",
    )
    max_fraction: float = for_researchers(
        1.0,
        gt=0.0,
        le=1.0,
        description="Upper limit of the budget, as a share of the request's context. `min_tokens` takes precedence.",
    )
    sink_tokens: int = for_researchers(
        4, ge=0, le=INT32, description="Number of tokens at the start of the context that are always read."
    )
    recent_tokens: int = for_researchers(
        64, ge=0, le=INT32, description="Number of tokens at the end of the context that are always read."
    )
    crossover_tokens: int | None = Field(
        None,
        ge=0,
        le=INT32,
        description="If the contexts of all requests in a batch have fewer tokens than this together, everything is "
        "read, because a selection would cost more than it saves. With a lossless method this concerns drafting alone. "
        "Default: a value of the method for the executor 'fa3'; for other executors 0, which means never.",
    )

    @property
    def fixed_budget(self) -> bool:
        """Whether a fixed share of the context is kept, instead of a share of the attention mass."""
        return True

    @property
    def mass_share(self) -> float:
        """The share of the attention mass that is kept; 1 where a share of the context is."""
        return 1.0

    @property
    def amount(self) -> str:
        return f"ratio={self.ratio:g}"

    def amount_of(self, attention: str) -> str:
        """The budget in words, for the log. attention: whose attention mass `top_p` is a share of."""
        return f"{self.amount} of {'the context' if self.fixed_budget else attention}"

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
        description="'top_k': read a fixed share of the context, `ratio`. 'top_p': read as many tokens as hold "
        "`top_p` of the attention mass. Default: 'top_p' if only `top_p` is given, else 'top_k'.",
    )
    top_p: float = Field(
        0.9,
        gt=0.0,
        le=1.0,
        description="Instead of `ratio`: share of the attention mass that the selected tokens hold. 1 reads "
        "everything, unless an upper limit is set.",
    )

    @property
    def fixed_budget(self) -> bool:
        return "top_p" not in self.model_fields_set if self.rule is None else self.rule == "top_k"

    @property
    def mass_share(self) -> float:
        return 1.0 if self.fixed_budget else self.top_p

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
        description="Share of the pairs of layer and request that are audited in each step, of those that read a "
        "selection. An audit measures how much of the target's attention mass the selection holds. It costs one more "
        "pass over the keys of the pair.",
    )

    @property
    def audited(self) -> float:
        return self.audit_share


def with_sketch(options: SpecAttnOptions) -> SketchedDraftOptions | None:
    """Options of a method that may keep a sketch; None if the method has none."""
    return options if isinstance(options, SketchedDraftOptions) else None


class SketchedDraftOptions(BudgetOptions):
    """A budget that a draft model may have too, through a sketch of its keys in the cache."""

    sparse_draft: bool = sparse_draft_field(False)
    draft_ratio: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="Share of the context that the draft model reads; needs `sparse_draft`. Default: the budget that "
        "the other options set.",
    )
    sketch_bits: Literal[1, 2, 4] = for_researchers(
        2, description="Bits per element of the sketch, the small copy of the keys that is searched."
    )

    @property
    def needs_token_pages(self) -> bool:
        return self.sparse_draft or super().needs_token_pages

    @property
    def sparse_readers(self) -> tuple[str, ...]:
        return (*super().sparse_readers, *(("drafting",) if self.sparse_draft else ()))

    @property
    def heads_share(self) -> Literal["layers", "heads", "none"]:
        """The heads of the target that share one budget."""
        return "none"

    @property
    def draft_reads(self) -> str:
        """What the steps of a draft model read, for the log."""
        return "a part" if self.sparse_draft else "everything"

    @property
    def sketch_bits_in_cache(self) -> int:
        return self.sketch_bits if self.sparse_draft else self.searched_bits

    @property
    def speculator(self) -> str:
        return SKETCH_SPECULATOR if self.sparse_draft else super().speculator

    @property
    def amount(self) -> str:
        alone = self.kind.lossless and self.draft_ratio is not None
        return f"ratio={self.draft_ratio:g}" if alone else super().amount

    def refusals(self, config: Any) -> Iterator[str]:
        spec = config.speculative_config
        if self.sketch_bits_in_cache:
            yield from unequal_pages(config)
            yield from large_heads_in_float32(config)
        if spec is not None and spec.uses_draft_model():
            return
        # The default of sparse_draft suits any drafter; only a user who sets it asks for a draft model.
        asks = self.model_fields_set & {"sparse_draft"} if self.sparse_draft else set()
        useless = self.model_fields_set & {"draft_ratio"} | (asks if spec is None else set())
        if useless:
            yield (
                f"{' and '.join(sorted(useless))} without a draft model, whose steps alone they are about: leave it "
                "out, or give --speculative-model DRAFT"
            )
        if asks:
            yield from another_drafter(config, "sparse_draft")

    @model_validator(mode="after")
    def _a_draft_s_ratio_has_a_draft_that_reads_a_part(self) -> Self:
        if self.draft_ratio is not None and not self.sparse_draft:
            raise ValueError(
                f"draft_ratio {self.draft_ratio:g} without sparse_draft, where every draft step reads everything: set "
                "sparse_draft=true, or leave draft_ratio out"
            )
        return self
