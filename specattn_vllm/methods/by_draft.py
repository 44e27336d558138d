"""Options of methods whose target reads what a draft model attended to."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt

from specattn_vllm.methods.budget import AuditedOptions, BudgetOptions
from specattn_vllm.options import for_researchers


class ByDraftOptions(BudgetOptions, AuditedOptions):
    """Which layer of the draft chooses, and how its steps become one selection."""

    layer_map: str | None = Field(
        None,
        description="Name of a shipped layer map, path of a JSON file, or 'uniform' (layers paired by depth, not "
        "calibrated). Default: the shipped map for this pair of models if there is one, else 'uniform'.",
    )
    dense_layers: tuple[NonNegativeInt, ...] = for_researchers(
        (), description="Target layers (from 0) that read everything, besides those the layer map leaves unmapped."
    )
    combine: Literal["sum", "union"] = for_researchers(
        "sum",
        description="How the K draft steps of a round become one selection: it is chosen by the 'sum' of their mass, "
        "or is the 'union' of each step's own (Shah, arXiv 2510.27641).",
    )
