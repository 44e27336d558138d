"""The pair of models that an evaluation is of: what they are called, and what the target takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specattn_vllm.causes import summary
from specattn_vllm.fingerprint import weights_digest
from specattn_vllm.installed import UserError
from specattn_vllm.tools.models import DEMO


def identity(role: str, name: str, folder: str) -> dict[str, Any]:
    """A model by name and, where its files are at hand, by its weights."""
    digest = weights_digest(Path(folder)) if Path(folder).is_dir() else None
    return {"name": f"the demo {role}" if name == DEMO else Path(name).name or name, "weights": digest}


def tokenizer_of(model: str) -> Any:
    """Called with a text, it makes token ids as vLLM does: with those that the model wants at the beginning."""
    from transformers import AutoTokenizer

    return _loaded(AutoTokenizer, model, "tokenizer")


def positions_of(model: str) -> int | None:
    """How many positions a model has, where its configuration says so and nothing stretches them."""
    from transformers import AutoConfig

    config = _loaded(AutoConfig, model, "configuration")
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("factor"):
        return None  # vLLM knows by how much
    return getattr(config, "max_position_embeddings", None)


def _loaded(kind: Any, model: str, what: str) -> Any:
    """transformers' reading of the target, whose reasons for failing are tracebacks of several libraries."""
    try:
        return kind.from_pretrained(model)
    except Exception as error:
        where = "this folder" if Path(model).is_dir() else "a name on the Hugging Face hub, nor a folder here"
        remedy = "see that its files are whole" if Path(model).is_dir() else "give a folder that holds a model"
        raise UserError(f"--target {model}: no {what} in {where} ({summary(error)}): {remedy}") from None
