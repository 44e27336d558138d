"""The options' fields, and what follows from them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from specattn_vllm import methods
from specattn_vllm.methods.base import Method

_INT32 = 2**31 - 1  # the kernels count tokens in 32 bits
MAX_DILATION = 64

Rule = Literal["top_p", "top_k"]
Combine = Literal["sum", "union"]
ExecutorName = Literal["auto", "torch", "triton", "fa3", "xformers"]


class OptionFields(BaseModel):
    """How the KV entries that verification reads are chosen. Counts are in tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field(
        methods.DEFAULT,
        description="; ".join(f"'{method.name}': {method.summary}" for method in methods.METHODS.values()) + ".",
    )
    preset: Literal["paper"] | None = Field(
        None,
        description="'paper': the published setting of the method, for all options that are not given themselves.",
    )
    layer_map: str | None = Field(
        None,
        description="Name of a shipped layer map, path of a JSON file, or 'uniform' (layers paired by depth, not "
        "calibrated). Default: the shipped map for this pair of models if there is one, else 'uniform'.",
    )
    rule: Rule | None = Field(
        None,
        description="'top_p': as many tokens as hold `top_p` of the attention mass. 'top_k': a fixed share of the "
        "context, `ratio`. Default: that of the one of the two that is given, else 'top_k'.",
    )
    top_p: float = Field(
        0.9, gt=0.0, le=1.0, description="Share of the attention mass on the context that the kept tokens hold."
    )
    ratio: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="Share of the context that rule 'top_k' keeps. Default: 0.25 for 'specattn', 0.125 for 'sketch', "
        "else 0.1.",
    )
    sketch_bits: Literal[1, 2, 4] = Field(
        2, description="With 'sketch', bits of each element of the copy of the keys that is searched."
    )
    shared_budget: Literal["layers", "heads", "none"] = Field(
        "layers",
        description="With 'sketch' and rule 'top_k', who shares what is read, so that 'ratio' is the mean: the KV "
        "heads of all 'layers', by a threshold that a request's last choosing step would have needed; the 'heads' of "
        "each layer; or 'none', each reads as much.",
    )
    layer_shares: bool = Field(
        True,
        description="With rule 'top_k', target layers get shares of their own out of `ratio`, which stays the mean: "
        "those that the layer map has for them. Without any in the map, and with false, all get the same.",
    )
    min_tokens: int = Field(
        128,
        ge=0,
        le=_INT32,
        description="Floor on kept tokens, sink and recent ones included; `ratio` and `max_fraction` yield to it.",
    )
    max_tokens: int | None = Field(None, ge=1, le=_INT32, description="Cap on kept tokens; none by default.")
    max_fraction: float = Field(
        1.0, gt=0.0, le=1.0, description="Cap on kept tokens as a share of the request's context."
    )
    sink_tokens: int = Field(4, ge=0, le=_INT32, description="First tokens of the context that are always kept.")
    recent_tokens: int = Field(64, ge=0, le=_INT32, description="Last tokens of the context that are always kept.")
    combine: Combine = Field(
        "sum",
        description="How the K draft steps of a round become one selection: it is chosen by the 'sum' of their mass, "
        "or is the 'union' of each step's own (Shah, arXiv 2510.27641).",
    )
    bonus_row: bool = Field(
        True,
        description="With combine 'sum', the last row of a verification, that of the bonus token, counts as well: the "
        "draft never gets there, so its last step's attention is taken, moved on by one token.",
    )
    induction: bool = Field(
        True,
        description="With rule 'top_k', in layers that the layer map names as copying, what follows an earlier "
        "occurrence of one of the round's tokens counts half of the mean attention more.",
    )
    dilation: int | None = Field(
        None,
        ge=0,
        le=MAX_DILATION,
        description="With 'vegas', positions by which attention is spread forward before tokens are chosen: heads that "
        "copy move on by a token a step. Default: K + 1, which covers a round of K draft tokens.",
    )
    dense_layers: tuple[int, ...] = Field(
        (), description="Target layers that always read everything, besides those the layer map leaves unmapped."
    )
    refresh_every: int | None = Field(
        None,
        ge=2,
        le=_INT32,
        description="Every so many verifications of a request, one reads everything, which bounds what sparse "
        "verification leaves behind in the KV cache. Default: never. For every verification, use method 'dense'.",
    )
    audit_share: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="Share of the (layer, request) pairs of each verification in which the target's attention mass on "
        "what was read is measured, at the cost of one more pass over the keys.",
    )
    audit_floor: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="With 'audit_share': a request whose audited pairs of a verification retain less of the target's "
        "attention mass, on average, reads everything for 'audit_dense_rounds'. Default: audits only report.",
    )
    audit_dense_rounds: int = Field(
        16,
        ge=1,
        le=_INT32,
        description="Verifications in which a request reads everything once it fell below 'audit_floor'.",
    )
    check_weights: bool = Field(
        True, description="Refuse a layer map calibrated on other weights of the same architecture."
    )
    sparse_draft: bool | None = Field(
        None,
        description="Whether the steps of a draft model read a part of its context. With 'sketch' and 'dense', what "
        "its own queries choose in the first step of a round, over a small copy of its keys; else what its first step "
        "attended to, which reads everything. Never changes the output distribution of 'dense'. Default: true for "
        "'sketch', else false.",
    )
    draft_ratio: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="With 'sparse_draft', share of the context that the draft's own steps keep. By default they choose "
        "as much as the target's selection does, by the rule above.",
    )
    refresh_draft_every: int = Field(
        1,
        ge=1,
        le=_INT32,
        description="With 'sparse_draft', the first draft step of a round reads everything in every so many rounds, "
        "and in the others what it attended to the last time, and everything since. 1: in every round.",
    )
    crossover_tokens: int | None = Field(
        None,
        ge=0,
        le=_INT32,
        description="Context tokens of a batch, summed over its requests, below which the target reads everything, "
        "because choosing would cost more than it saves; with 'sparse_draft' the draft still reads a part, unless the "
        "target always reads everything. Default: what was measured for the executor, 0 where nothing was.",
    )
    executor: ExecutorName = Field(
        "auto",
        description="'fa3' (FlashAttention 3, Hopper), 'xformers' (other CUDA GPUs, whole blocks), 'triton' (CUDA; on "
        "CPU through the interpreter), 'torch' (CPU), or the first of these that runs.",
    )
    stats_interval_s: float = Field(60.0, gt=0.0, description="Seconds between the statistics lines in the log.")

    @property
    def kind(self) -> Method:
        """The method, as it describes itself."""
        return methods.find(self.method)

    @property
    def counts_bonus_row(self) -> bool:
        """Whether the steps' mass has that of the row that verification has and the draft has not."""
        return self.bonus_row and self.combine == "sum"

    @property
    def fixed_budget(self) -> bool:
        """Whether a fixed share of the context is kept, instead of a share of the attention mass."""
        if self.kind.fixed_rule or self.rule is None:
            return self.kind.fixed_rule or "top_p" not in self.model_fields_set
        return self.rule == "top_k"

    @property
    def ratio_or_default(self) -> float:
        """Share of the context that a fixed budget is."""
        if self.ratio is not None:
            return self.ratio
        return self.kind.ratio

    def dilation_or_default(self, draft_tokens: int) -> int:
        """Positions by which attention is spread forward, in rounds of so many draft tokens."""
        return min(draft_tokens + 1, MAX_DILATION) if self.dilation is None else self.dilation

    @property
    def uses_layer_shares(self) -> bool:
        """Whether the layer map may say how much of the budget each layer gets."""
        return self.layer_shares and self.fixed_budget

    @property
    def uses_induction(self) -> bool:
        """Whether the layer map may name layers that copy. A union is chosen before the drafts are all known."""
        return self.induction and self.fixed_budget and self.combine != "union"

    @property
    def per_head(self) -> bool:
        """Whether each KV head of the target reads a selection of its own in verification."""
        return self.kind.per_head

    @property
    def needs_token_pages(self) -> bool:
        """Whether some selection is of single tokens and heads, which an executor of whole blocks cannot read."""
        return self.per_head or self.chooses_by_itself or self.drafts_by_sketch

    @property
    def chooses_by_itself(self) -> bool:
        """Whether the target's own queries choose, layer by layer."""
        return self.kind.target_reads == "own choice"

    @property
    def drafts_sparsely(self) -> bool:
        """Whether the steps of a draft model, if there is one, read a part of its context."""
        return self.kind.sparse_draft if self.sparse_draft is None else self.sparse_draft

    @property
    def drafts_by_sketch(self) -> bool:
        """Whether a draft model chooses what it reads by a sketch of its keys."""
        return self.drafts_sparsely and self.kind.drafts_by_sketch

    @property
    def keeps_sketches(self) -> bool:
        """Whether there is room for sketches in the cache."""
        return self.kind.keeps_sketch or self.drafts_by_sketch

    @property
    def chooses_by_draft(self) -> bool:
        """Whether a draft model's attention decides what the target's verification reads."""
        return self.kind.target_reads == "draft's choice"

    @property
    def drafts_for_itself(self) -> bool:
        """Whether the target is its own draft model."""
        return self.kind.drafter == "target"

    @property
    def goes_with_any_drafter(self) -> bool:
        """Whether vLLM's own drafters will do, because nothing is asked of a draft model's attention."""
        return self.kind.drafter == "any" and not self.sparse_draft

    @property
    def is_lossless(self) -> bool:
        """Whether the output distribution is the target's own."""
        return self.kind.lossless
