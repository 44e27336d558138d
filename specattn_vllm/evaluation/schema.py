"""A setting, one row of the table, as JSON. Loads no torch."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from specattn_vllm.evaluation.peer_options import PeerOptions
from specattn_vllm.evaluation.scan import of_sketch
from specattn_vllm.options import SpecAttnOptions

DENSE_OPTIONS = {"method": "dense"}


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Setting(StrictModel):
    """One row of the table: the plugin's options under a name, or another's selection in the place of the plugin's."""

    name: str = Field(min_length=1)
    options: dict[str, Any]
    peer: PeerOptions | None = None
    other_batches: bool = False
    """Whether this is the dense run once more, with half as many requests at a time and prompts in other chunks. It
    differs by nothing but what rounding makes of other shapes, which no other setting's KL can be told from."""

    @field_validator("options")
    @classmethod
    def _usable(cls, options: dict[str, Any]) -> dict[str, Any]:
        SpecAttnOptions.parse(options)
        return options

    @model_validator(mode="after")
    def _one_method(self) -> Setting:
        if self.peer is not None and self.options != DENSE_OPTIONS:
            raise ValueError(
                f"a peer ({self.peer.name!r}) reads in the place of the plugin, not beside it: its options are "
                f"{json.dumps(DENSE_OPTIONS)}, got {json.dumps(self.options)}"
            )
        if self.other_batches and (self.options != DENSE_OPTIONS or self.peer is not None):
            raise ValueError(
                f"'other_batches' is the dense run once more: options are {json.dumps(DENSE_OPTIONS)}, without a peer"
            )
        return self

    @property
    def is_reference(self) -> bool:
        """Whether this is what the others are compared with: the target alone, with all of its KV."""
        return self.options == DENSE_OPTIONS and self.peer is None and not self.other_batches

    def scan_share(self, head_size: int) -> float:
        """Bytes read of what is searched, for each byte of the entries searched; 0 where nothing is."""
        if self.peer is not None:
            return self.peer.scan_share(head_size)
        options = SpecAttnOptions.parse(self.options)
        return of_sketch(options.sketch_bits, head_size) if options.kind.keeps_sketch else 0.0

    @property
    def selects(self) -> bool:
        """Whether the plugin prunes what the target reads."""
        return self.peer is None and not self.lossless

    @property
    def lossless(self) -> bool:
        return self.peer is None and SpecAttnOptions.parse(self.options).kind.lossless
