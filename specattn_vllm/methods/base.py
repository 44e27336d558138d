"""What a method is: a way to choose which KV entries are read, with its whole description in one place.

A method is one file of this folder, with one `Method` and the pydantic model of its options, and one line in the
registry (`__init__.py`). Code elsewhere asks the `Method` or its options for what differs, and has no condition on it.
docs/add-a-method.md shows how to write a method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel

Reads = Literal["everything", "draft's choice", "own choice"]

DENSE_REASONS: Mapping[Reads, tuple[str, ...]] = {
    "everything": (),
    "draft's choice": ("exact", "small batch", "no selection", "stale"),
    "own choice": ("exact", "small batch", "short context"),
}


@dataclass(frozen=True)
class Method:
    """One method. All fields are data. Code is named by its import path, and only the worker loads it."""

    name: str
    summary: str
    """One sentence for the command line and the documents: who chooses the KV entries that are read."""
    target_reads: Reads
    """The tokens that a verification reads. 'everything': it is dense. 'draft's choice': those that the draft model
    attended to, by a layer map. 'own choice': in each layer, those that the step's own queries choose (`attach`)."""
    options: type[BaseModel]
    """Its options and their defaults: a subclass of `SpecAttnOptions`, its own or a shared one. It also says who may
    draft: any drafter of vLLM's, or none (`budget.py`); a separate draft model, whose attention makes the target's
    selection (`by_draft.py`, needed for 'draft's choice'); or the target itself (`self_draft.py`)."""
    per_head: bool = False
    """Whether each KV head of the target reads a selection of its own."""
    crossover: Mapping[str, int] = field(default_factory=dict)
    """Executor -> context tokens of a batch below which dense attention is faster; 0 for executors that are missing."""
    draft_length: int = 4
    """Default number of draft tokens per round."""
    paper: Mapping[str, Any] | str = "nobody published one"
    """The published setting, as options; or the reason why there is none."""
    maps: tuple[str, ...] = ("specattn", "sts")
    """Methods whose layer maps this method can use, the best first."""
    map_keys: tuple[str, ...] = ("layers",)
    """The keys of a layer map that say, for each target layer, what chooses for it."""
    plan: str | None = None
    """With 'draft's choice': import path of a function(layer map, target layers, KV heads of target and draft on this
    rank) that returns the `Plan` (`speculation/maps.py`)."""
    smaller: str = ""
    """What else helps if buffers are too large: a clause that begins with ', or'."""
    check: str = "specattn_vllm.methods.refusals.nothing_more"
    """Import path of a function(vllm_config, options), called at start-up if there is no refusal. It raises an error if
    the method cannot serve these models."""
    speculator: str = "specattn_vllm.speculation.rounds.RoundSpeculator"
    """Import path of the class that replaces vLLM's draft-model speculator."""
    attach: str = "specattn_vllm.speculation.counting.watch_drafter"
    """Import path of a function(runner, options). It is called when vLLM's model runner has loaded its models, before
    the runner measures the memory that is left for the KV cache."""

    def map_rank(self, made_for: str) -> int | None:
        """How well a layer map that was made for a method suits this one: 0 is best; None: it cannot be used."""
        return self.maps.index(made_for) if made_for in self.maps else None

    @property
    def lossless(self) -> bool:
        """Whether the output is the target's own, because its verification is dense."""
        return self.target_reads == "everything"

    @property
    def readers(self) -> tuple[str, ...]:
        """What reads a part of its cache, drafting left out."""
        return () if self.lossless else ("verification",)

    @property
    def needs_token_pages(self) -> bool:
        """Whether some selection is made of single tokens of single heads."""
        return self.per_head or self.target_reads == "own choice"

    @property
    def guarantee(self) -> str:
        """'lossless' or 'approximate'."""
        return "lossless" if self.lossless else "approximate"

    @property
    def dense_reasons(self) -> tuple[str, ...]:
        """The reasons for which rows past their prompt read everything, where others read a part."""
        return DENSE_REASONS[self.target_reads]
