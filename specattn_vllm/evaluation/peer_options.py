"""Selections of other work that settings are compared with, as a settings file names them. Loads no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from specattn_vllm.evaluation import scan


class _PeerOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def scan_share(self, head_size: int) -> float:
        """Bytes that are read of what is searched, for each byte of the entries searched."""
        del head_size
        return 0.0


class Quest(_PeerOptions):
    """Quest (Tang et al., ICML 2024, arXiv 2406.10774): pages of the cache by an upper bound of their scores."""

    name: Literal["quest"]
    ratio: float = Field(gt=0, le=1)
    """Share of the context that is read, in whole pages."""
    page_size: int = Field(16, ge=1)
    dense_layers: int = Field(2, ge=0)
    """First layers that read everything; two as published."""

    def scan_share(self, head_size: int) -> float:
        return scan.of_pages(self.page_size)


class MeanStd(_PeerOptions):
    """Pages of the cache by the mean and the standard deviation of their keys."""

    name: Literal["mean_std"]
    ratio: float = Field(gt=0, le=1)
    """Share of the context that is read, in whole pages."""
    page_size: int = Field(16, ge=1)
    spread: float = Field(1.0, ge=0)
    """Standard deviations that a page's score is above its mean's."""
    dense_layers: int = Field(0, ge=0)

    def scan_share(self, head_size: int) -> float:
        return scan.of_pages(self.page_size)


class Channels(_PeerOptions):
    """Tokens by a few channels of their keys, as Double Sparsity (Yang et al., arXiv 2408.07092)."""

    name: Literal["channels"]
    ratio: float = Field(gt=0, le=1)
    """Share of the context that is read."""
    channels: int = Field(16, ge=1)
    """Of a key's elements, in 16 bits each."""
    dense_layers: int = Field(0, ge=0)

    def scan_share(self, head_size: int) -> float:
        return scan.of_channels(self.channels, head_size)


class Oracle(_PeerOptions):
    """The target's own attention of the very rows that are verified: what no selection of its size can know better.
    It cannot be served, since whoever has read everything has nothing left to save."""

    name: Literal["oracle"]
    ratio: float | None = Field(None, gt=0, le=1)
    """Share of the context that is kept, the heaviest tokens; or ..."""
    top_p: float | None = Field(None, gt=0, le=1)
    """... the fewest tokens that hold this share of the attention mass."""
    shared: bool = False
    """One selection for all KV heads of a layer, not one for each."""
    dense_layers: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _one_size(self) -> Oracle:
        if (self.ratio is None) == (self.top_p is None):
            raise ValueError("a peer 'oracle' has a ratio or a top_p, one of them: how much is kept")
        return self


PeerOptions = Annotated[Quest | MeanStd | Channels | Oracle, Field(discriminator="name")]
