"""Options of methods whose target reads what a draft model attended to."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, model_validator

from specattn_vllm.methods.budget import INT32, SparseDraftOptions
from specattn_vllm.options import for_researchers


class ByDraftOptions(SparseDraftOptions):
    """Which layer of the draft chooses, how its steps become one selection, and when everything is read instead."""

    layer_map: str | None = Field(
        None,
        description="Name of a shipped layer map, path of a JSON file, or 'uniform' (layers paired by depth, not "
        "calibrated). Default: the shipped map for this pair of models if there is one, else 'uniform'.",
    )
    layer_shares: bool = for_researchers(
        True,
        description="With a fixed share, target layers get shares of their own out of `ratio`, which stays the mean: "
        "those that the layer map has for them. Without any in the map, and with false, all get the same.",
    )
    dense_layers: tuple[NonNegativeInt, ...] = for_researchers(
        (), description="Target layers (from 0) that read everything, besides those the layer map leaves unmapped."
    )
    combine: Literal["sum", "union"] = for_researchers(
        "sum",
        description="How the K draft steps of a round become one selection: it is chosen by the 'sum' of their mass, "
        "or is the 'union' of each step's own (Shah, arXiv 2510.27641).",
    )
    bonus_row: bool = for_researchers(
        True,
        description="With combine 'sum', the last row of a verification, that of the bonus token, counts as well: the "
        "draft never gets there, so its last step's attention is taken, moved on by one token.",
    )
    induction: bool = for_researchers(
        True,
        description="With a fixed share, in layers that the layer map names as copying, what follows an earlier "
        "occurrence of one of the round's tokens counts half of the mean attention more.",
    )
    refresh_every: int | None = for_researchers(
        None, ge=2, le=INT32,
        description="Every so many verifications of a request, one reads everything, which bounds what sparse "
        "verification leaves behind in the KV cache. Default: never. For every verification, use method 'dense'.",
    )  # fmt: skip
    audit_share: float = for_researchers(
        0.0, ge=0.0, le=1.0,
        description="Share of the (layer, request) pairs of each verification in which the target's attention mass on "
        "what was read is measured, at the cost of one more pass over the keys.",
    )  # fmt: skip
    audit_floor: float | None = for_researchers(
        None, gt=0.0, le=1.0,
        description="With `audit_share`: a request whose audited pairs of a verification retain less of the target's "
        "attention mass, on average, reads everything for `audit_dense_rounds`. Default: audits only report.",
    )  # fmt: skip
    audit_dense_rounds: int = for_researchers(
        16, ge=1, le=INT32,
        description="Verifications in which a request reads everything once it fell below `audit_floor`.",
    )  # fmt: skip

    @property
    def counts_bonus_row(self) -> bool:
        """Whether the steps' mass has that of the row that verification has and the draft has not."""
        return self.bonus_row and self.combine == "sum"

    @property
    def uses_layer_shares(self) -> bool:
        """Whether the layer map may say how much of the budget each layer gets."""
        return self.layer_shares and self.fixed_budget

    @property
    def uses_induction(self) -> bool:
        """Whether the layer map may name layers that copy. A union is chosen before the drafts are all known."""
        return self.induction and self.fixed_budget and self.combine != "union"

    @model_validator(mode="after")
    def _what_is_given_has_what_it_needs(self) -> Self:
        if self.audit_floor is not None and not self.audit_share:
            raise ValueError(
                f"audit_floor {self.audit_floor} without audit_share, so that nothing is measured: set audit_share, "
                "such as to 0.05, or leave audit_floor out"
            )
        if "audit_dense_rounds" in self.model_fields_set and self.audit_floor is None:
            raise ValueError(
                f"audit_dense_rounds {self.audit_dense_rounds} without audit_floor, below which it would begin: set "
                "audit_floor, or leave it out"
            )
        if "bonus_row" in self.model_fields_set and self.bonus_row and self.combine == "union":
            raise ValueError(
                "bonus_row true with combine 'union', which looks at one draft step at a time: set combine to 'sum', "
                "or leave bonus_row out"
            )
        return self
