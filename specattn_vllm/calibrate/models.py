"""Runs both models in transformers, and passes on their attention.

transformers calls our registered attention function with q and k after RoPE. It attends as PyTorch does, and also makes
the attention rows of chosen queries. So no full attention matrix is ever in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from specattn_vllm.installed import UserError
from specattn_vllm.tools.models import model_folder

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
NAME = "specattn_calibrate"
BLOCK = 64
"""Rows that are made at once. Besides the results, only one block, of all query heads, is in memory."""


def rows_of(query: torch.Tensor, key: torch.Tensor, queries: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention rows of `queries` in the window: [KV heads, queries, tokens] float32, averaged over query heads.

    query: [query heads, tokens, size], key: [KV heads, tokens, size].
    """
    heads, tokens, _ = key.shape
    grouped = query.unflatten(0, (heads, -1))
    position = torch.arange(tokens, device=key.device)
    blocks = []
    for block in queries.split(BLOCK):
        scores = grouped[:, :, block].flatten(1, 2).float() @ key.float().transpose(1, 2) * scaling
        scores = scores.unflatten(1, (-1, len(block))).masked_fill_(position > block[:, None], float("-inf"))
        blocks.append(scores.softmax(-1).mean(1))
    return torch.cat(blocks, 1)


def _attend(module, query, key, value, attention_mask, scaling, queries, see, **_):
    """transformers calls this: query [1, query heads, tokens, size], key and value [1, KV heads, tokens, size].
    `queries` and `see` are the arguments of `look`."""
    see(rows_of(query[0], key[0], queries, scaling))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


def load(folder: Path, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """A model for `look`, without its LM head, which is not needed."""
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(NAME, _attend)
    # Not AutoModel: it reports the weights of the LM head as unexpected, which looks like an error.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=NAME, local_files_only=True)
    return model.base_model.to(device).eval()


@torch.inference_mode()
def look(model: torch.nn.Module, ids: torch.Tensor, queries: torch.Tensor, see: Callable[[torch.Tensor], None]) -> None:
    """Run a window `ids` [tokens] through the model. For each layer in turn, `see` gets the attention rows of `queries`
    [queries], as `rows_of` makes them."""
    model(input_ids=ids[None].to(model.device), use_cache=False, queries=queries.to(model.device), see=see)


def find(role: str, name: str) -> Path:
    """The folder of a model: of the demo pair, a given folder, or one downloaded from the Hugging Face hub."""
    if (folder := Path(model_folder(role, name))).is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--{role} {name}: neither a folder nor a model of the Hugging Face hub ({reason})") from None


def check(folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """The configuration of each model. Raises UserError for models that cannot be calibrated."""
    configs = {}
    for role, folder in folders.items():
        try:
            config = configs[role] = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"--{role} {folder}: config.json cannot be read ({error})") from None
        name = (config.get("architectures") or ["unknown"])[0]
        if name not in ARCHITECTURES:
            raise UserError(f"--{role} {folder}: architecture {name} is not supported, only {', '.join(ARCHITECTURES)}")
        windowed = config.get("sliding_window") is not None and config.get("use_sliding_window", True)
        if windowed or "sliding_attention" in (config.get("layer_types") or ()):
            raise UserError(f"--{role} {folder}: sliding-window attention is not supported; use a model without it")
        if not any(folder.glob("*.safetensors")):
            raise UserError(f"--{role} {folder}: no *.safetensors file in this folder")
    sizes = [configs[role].get("vocab_size") for role in ("target", "draft")]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"target and draft have vocabularies of {sizes[0]} and {sizes[1]} tokens: drafting needs equal ones; use a "
            "draft of the target's family"
        )
    return configs


def tokenizer_of(folders: dict[str, Path]) -> Any:
    """The tokenizer that both models share. Raises UserError if their tokenizers differ."""
    from transformers import AutoTokenizer

    found = {}
    for role, folder in folders.items():
        try:
            found[role] = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--{role} {folder}: its tokenizer cannot be loaded ({reason})") from None
    if found["target"].get_vocab() != found["draft"].get_vocab():
        raise UserError(
            "the tokenizers of target and draft give different ids to the same text: use a draft of the target's family"
        )
    return found["target"]
