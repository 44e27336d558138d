"""A setting, one row of the table, as JSON: the plugin's options, or a baseline in their place. Loads no torch."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from specattn_vllm.evaluation import scan
from specattn_vllm.options import SpecAttnOptions

DENSE_OPTIONS = {"method": "dense"}


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid")


class OfSetting(BaseModel):
    """What a setting is, also in reports by other versions."""

    name: str
    options: dict[str, Any]
    baseline: Any = None
    other_batches: bool = False
    """Whether this is the dense run once more, with half as many requests at a time and prompts in other chunks. It
    differs by nothing but what rounding makes of other shapes, which no other setting's KL can be told from."""
    fp8_cache: bool = False
    """Whether the KV cache has 8-bit floats."""

    @property
    def is_reference(self) -> bool:
        """Whether this is what the others are compared with: the target alone, with all of its KV."""
        changed = self.baseline is not None or self.other_batches or self.fp8_cache
        return self.options == DENSE_OPTIONS and not changed


class _Baseline(StrictModel):
    """Another work's selection; `baselines.py` says what each does."""

    ratio: float = Field(gt=0, le=1)
    """Share of the context that is read, in whole pages where pages are chosen."""
    dense_layers: int = Field(0, ge=0)
    """First layers that read everything."""


class MeanStd(_Baseline):
    name: Literal["mean_std"]
    page_size: int = Field(16, ge=1)


class Quest(_Baseline):
    name: Literal["quest"]
    page_size: int = Field(16, ge=1)
    dense_layers: int = Field(2, ge=0)
    """Two as published."""


class Channels(_Baseline):
    name: Literal["channels"]
    channels: int = Field(16, ge=1)
    """Of a key's elements, in 16 bits each."""


class Oracle(_Baseline):
    """It cannot be served, since whoever has read everything has nothing left to save; what it reads to find the
    heaviest tokens is not counted."""

    name: Literal["oracle"]


BaselineOptions = Annotated[Quest | MeanStd | Channels | Oracle, Field(discriminator="name")]


class Setting(OfSetting, StrictModel):
    """One row of the table: the plugin's options under a name, or another's selection in the place of the plugin's."""

    name: str = Field(min_length=1)
    baseline: BaselineOptions | None = None

    @field_validator("options")
    @classmethod
    def _usable(cls, options: dict[str, Any]) -> dict[str, Any]:
        SpecAttnOptions.parse(options)
        return options

    @model_validator(mode="after")
    def _one_method(self) -> Setting:
        if self.baseline is not None and self.options != DENSE_OPTIONS:
            raise ValueError(
                f"a baseline ({self.baseline.name!r}) reads in the place of the plugin, not beside it: its options are "
                f"{json.dumps(DENSE_OPTIONS)}, got {json.dumps(self.options)}"
            )
        if self.other_batches and (self.options != DENSE_OPTIONS or self.baseline is not None or self.fp8_cache):
            raise ValueError(
                f"'other_batches' is the dense run once more: options are {json.dumps(DENSE_OPTIONS)}, without a "
                "baseline and without fp8_cache"
            )
        return self

    @property
    def lossless(self) -> bool:
        if self.baseline is not None or self.fp8_cache:
            return False
        return SpecAttnOptions.parse(self.options).kind.lossless

    def scan_share(self, head_size: int) -> float:
        """Bytes read of what is searched, for each byte of the entries searched; 0 where nothing is."""
        if isinstance(self.baseline, MeanStd | Quest):
            # Two vectors as long as a key for each page, as exact as keys: as much as one entry.
            return 1 / self.baseline.page_size
        if isinstance(self.baseline, Channels):
            # In a copy of their own, of 16 bits.
            return self.baseline.channels / (2 * head_size) * (2 if self.fp8_cache else 1)
        bits = SpecAttnOptions.parse(self.options).searched_bits
        return scan.of_sketch(bits, head_size, self.fp8_cache) if bits else 0.0
