"""What a method is: a way to choose which entries of the KV cache are read, described once.

A method is a file of this folder with one `Method` and the model of its options, and a line in the registry
(`__init__.py`). Everything outside that has to know something of a method asks its `Method`, or its options, and
compares no names. docs/add-a-method.md shows how to write one.
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
    """One way to choose. Everything is data; code is named by its path and loaded in the worker alone."""

    name: str
    summary: str
    """One sentence for the command line and the documents: who chooses what is read."""
    drafter: Drafter
    """Who may draft. 'any': a drafter of vLLM's, or nobody; 'draft model': one is needed, because its attention is
    what the target's choice is made of; 'target': the target drafts for itself."""
    target_reads: Reads
    """What a verification reads. 'draft's choice': what the draft model attended to, by a layer map; 'own choice': what
    the step's own queries choose, layer by layer, through `attach`."""
    options: type[BaseModel]
    """Its options, with their defaults: a `SpecAttnOptions` of its own, or one that it shares (`budget.py`). With
    'draft's choice', it is a `ByDraftOptions` (`by_draft.py`)."""
    per_head: bool = False
    """Whether each KV head of the target reads a selection of its own."""
    keeps_sketch: bool = False
    """Whether the target keeps a sketch of its keys in the cache."""
    window: bool = False
    """Whether a target that drafts for itself reads the first and the last tokens, whatever it attended to."""
    crossover: Mapping[str, int] = field(default_factory=dict)
    """Executor -> context tokens of a batch below which reading everything is faster; 0 where it is not named."""
    draft_crossover: Mapping[str, int] = field(default_factory=dict)
    """The same of drafting, where it is the draft model alone that reads a part."""
    paper: Mapping[str, Any] | str = "nobody published one"
    """The published setting, as options; or why there is none."""
    maps: tuple[str, ...] = ("specattn", "sts")
    """Methods whose layer maps serve this one, the best first."""
    speculator: str = "specattn_vllm.speculation.speculator.SpecAttnSpeculator"
    """Path of the class that drafts in the place of vLLM's draft-model speculator."""
    attach: str | None = None
    """Path of a function(runner, options), called once vLLM's model runner has loaded its models and before it measures
    what is left for the KV cache."""

    @property
    def lossless(self) -> bool:
        """Whether the output is the target's own: its verification reads everything."""
        return self.target_reads == "everything"
