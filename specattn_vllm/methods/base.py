"""What a method is: a way to choose which KV entries are read, with its whole description in one place.

A method is one file of this folder, with one `Method` and the pydantic model of its options, and one line in the
registry (`__init__.py`). Code elsewhere asks the `Method` or its options, and never compares method names.
docs/add-a-method.md shows how to write a method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel

Drafter = Literal["any", "draft model", "target"]
Reads = Literal["everything", "draft's choice", "own choice"]


@dataclass(frozen=True)
class Method:
    """One method. All fields are data. Code is named by its import path, and only the worker loads it."""

    name: str
    summary: str
    """One sentence for the command line and the documents: who chooses the KV entries that are read."""
    drafter: Drafter
    """Who may draft. 'any': any drafter of vLLM's, or none. 'draft model': a separate draft model is required, because
    the target's selection is made from its attention. 'target': the target drafts for itself."""
    target_reads: Reads
    """The tokens that a verification reads. 'everything': it is dense. 'draft's choice': those that the draft model
    attended to, by a layer map. 'own choice': in each layer, those that the step's own queries choose (`attach`)."""
    options: type[BaseModel]
    """Its options and their defaults: a subclass of `SpecAttnOptions`, its own or a shared one (`budget.py`). With
    'draft's choice', it is a `ByDraftOptions` (`by_draft.py`)."""
    per_head: bool = False
    """Whether each KV head of the target reads a selection of its own."""
    keeps_sketch: bool = False
    """Whether the target keeps a sketch of its keys in the cache."""
    window: bool = False
    """Whether a target that drafts for itself reads the first and the last tokens, whatever it attended to."""
    crossover: Mapping[str, int] = field(default_factory=dict)
    """Executor -> context tokens of a batch below which dense attention is faster; 0 for executors that are missing."""
    draft_crossover: Mapping[str, int] = field(default_factory=dict)
    """As `crossover`, for drafting in engines in which only the draft model is sparse."""
    paper: Mapping[str, Any] | str = "nobody published one"
    """The published setting, as options; or the reason why there is none."""
    maps: tuple[str, ...] = ("specattn", "sts")
    """Methods whose layer maps this method can use, the best first."""
    speculator: str = "specattn_vllm.speculation.speculator.SpecAttnSpeculator"
    """Import path of the class that replaces vLLM's draft-model speculator."""
    attach: str | None = None
    """Import path of a function(runner, options). It is called when vLLM's model runner has loaded its models, before
    the runner measures the memory that is left for the KV cache."""

    @property
    def lossless(self) -> bool:
        """Whether the output is the target's own, because its verification is dense."""
        return self.target_reads == "everything"
