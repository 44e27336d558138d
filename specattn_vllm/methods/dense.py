"""Dense attention: for comparison, and for speculation with a cheaper draft model (`sparse_draft`)."""

from typing import Self

from pydantic import model_validator

from specattn_vllm.methods.base import Method
from specattn_vllm.methods.budget import SketchedDraftOptions
from specattn_vllm.options import SpecAttnOptions

AMOUNT = frozenset({"rule", "top_p", "ratio", "max_fraction"})
"""Options that `draft_ratio` replaces."""


class DenseOptions(SketchedDraftOptions):
    """The budget of a sparse draft model; without `sparse_draft`, budget options are refused."""

    @property
    def usable(self) -> frozenset[str]:
        if not self.sparse_draft:
            return frozenset(SpecAttnOptions.model_fields) | {"sparse_draft"}
        return super().usable - (AMOUNT if self.draft_ratio is not None else frozenset())

    @model_validator(mode="after")
    def _something_reads_a_part(self) -> Self:
        if useless := ", ".join(sorted(self.model_fields_set - self.usable)):
            raise ValueError(
                f"{useless} beside draft_ratio, which stands in for it: leave one of them out"
                if self.sparse_draft
                else f"{useless} without sparse_draft, where everything is read: set sparse_draft=true, or leave it out"
            )
        return self


METHOD = Method(
    name="dense",
    summary="the target reads everything (lossless; the control)",
    target_reads="everything",
    options=DenseOptions,
    # Below this a sparse draft is dense. Derived from kernel times, for a round of a 1B model with six steps and one
    # search (docs/sketch.md).
    crossover={"fa3": 16384},
    paper="it reads everything",
)
