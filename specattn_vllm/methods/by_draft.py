"""Options of methods whose target reads the tokens that a draft model attended to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, NonNegativeInt

from specattn_vllm.methods.budget import AuditedOptions, BudgetOptions
from specattn_vllm.methods.refusals import another_drafter, capped_logits, other_layers
from specattn_vllm.options import SINKS, SOFT_CAP, for_researchers

SPECULATOR = "specattn_vllm.speculation.speculator.SpecAttnSpeculator"


class ByDraftOptions(BudgetOptions, AuditedOptions):
    """Which layers of the draft model choose, and how the steps of a round become one selection."""

    layer_map: str | None = Field(
        None,
        description="The layer map: name of a shipped one, path of a JSON file, or 'uniform' (layers are paired by "
        "depth, without calibration). Default: the shipped map for this pair of models if there is one, else "
        "'uniform'.",
    )
    dense_layers: tuple[NonNegativeInt, ...] = for_researchers(
        (), description="Target layers, counted from 0, that are dense in addition to those that the map leaves dense."
    )
    combine: Literal["sum", "union"] = for_researchers(
        "sum",
        description="How the K draft steps of a round become one selection. 'sum': select by the sum of their "
        "attention mass. 'union': select for each step, and read the union (Shah, arXiv 2510.27641).",
    )

    @property
    def cannot_have(self) -> tuple[str, ...]:
        return SINKS, SOFT_CAP  # what captures scores attends without them

    def refusals(self, config: Any) -> Iterator[str]:
        yield from other_layers(config, self.method)
        yield from capped_logits(config, f"method {self.method!r}", "use method 'sketch' or 'dense'")
        yield from another_drafter(config, f"method = {self.method!r}")
        if config.speculative_config is None:
            yield (
                f"method = {self.method!r} without a draft model: give --speculative-model DRAFT "
                "--num-speculative-tokens K, or set method='dense' to use the backend for plain decoding"
            )
