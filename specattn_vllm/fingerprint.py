"""The facts of a model that a layer map is checked against."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict


class ModelFacts(BaseModel):
    """Architecture of a model, and a digest of samples of its weights if its files are available."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    weights: str | None = None

    def differences(self, other: ModelFacts) -> list[str]:
        """Fields in which two models differ, as 'name: ours != theirs'. An unknown digest counts as equal."""
        ours, theirs = self.model_dump(), other.model_dump()
        if self.weights is None or other.weights is None:
            del ours["weights"]
        return [f"{name}: {value} != {theirs[name]}" for name, value in ours.items() if value != theirs[name]]


def facts_from_config(config: Any, folder: Path | None = None) -> ModelFacts:
    """Facts from a Hugging Face text config (object or dict); `folder` adds the digest of its weight files."""

    def get(name: str) -> Any:
        return config.get(name) if isinstance(config, dict) else getattr(config, name, None)

    heads, hidden_size = get("num_attention_heads"), get("hidden_size")
    architectures = get("architectures") or ["unknown"]
    return ModelFacts(
        architecture=architectures[0],
        num_hidden_layers=get("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=get("num_key_value_heads") or heads,
        head_dim=get("head_dim") or (hidden_size // heads if hidden_size and heads else None),
        hidden_size=hidden_size,
        vocab_size=get("vocab_size"),
        weights=weights_digest(folder) if folder is not None else None,
    )


def fingerprint(folder: str | Path) -> dict[str, Any]:
    """The facts of the model in a local folder, in the form that a layer map stores."""
    config = json.loads(Path(folder, "config.json").read_text())
    return facts_from_config(config, Path(folder)).model_dump()


def weights_digest(folder: Path) -> str | None:
    """SHA-256 over 16 evenly spaced samples of each safetensors file; None if there are none.

    Samples are enough to tell two fine-tuned models apart, and start-up does not read a 16 GB checkpoint twice.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            for i in range(16):
                file.seek(size * i // 16)
                digest.update(file.read(4096))
    return digest.hexdigest()
