"""Both models in transformers, and what is looked at while they attend.

transformers calls an attention function by its registered name with q and k as they are after RoPE. Ours attends as
PyTorch does and also makes the rows of chosen queries, so that no full attention matrix ever stands in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from specattn_vllm.installed import UserError
from specattn_vllm.tools.models import model_folder

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
NAME = "specattn_calibrate"
BLOCK = 64
"""Rows that are made at a time: a block of all query heads is what stands in memory beside the rows themselves."""


@dataclass
class Pass:
    """What one forward pass looks at or reads."""

    queries: torch.Tensor | None = None
    """[queries] positions whose rows are made."""
    see: Callable[[int, torch.Tensor], None] | None = None
    """Takes a layer's number and its rows, [KV heads, queries, tokens] float32, query heads averaged."""
    keep_prefix: int = 0
    """Tokens at the beginning whose keys and values are kept for later passes over the rest."""
    masks: dict[int, torch.Tensor] | None = None
    """With it the pass goes over the rest: of a layer, [1 or KV heads, rows, tokens] bool, what each row attends to.
    Layers without one read everything."""
    causal: torch.Tensor | None = field(default=None, repr=False)
    """[1, rows, tokens] bool: everything, for the others."""


def rows_of(query: torch.Tensor, key: torch.Tensor, queries: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention of `queries` in the window: [KV heads, queries, tokens] float32, query heads averaged.

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


class Model:
    """A causal language model whose attention is looked at."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM

        AttentionInterface.register(NAME, _attend)
        self.device = device
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=NAME, local_files_only=True
        ).to(device)  # fmt: skip
        self.model.eval()
        self.layers = self.model.config.num_hidden_layers
        self.kv_heads = self.model.config.num_key_value_heads
        self._pass = Pass()
        self._prefix: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._inputs: list[torch.Tensor] = []
        for layer in self.model.base_model.layers:
            layer.self_attn.calibrated_model = self

    @torch.inference_mode()
    def look(self, ids: torch.Tensor, queries: torch.Tensor, see: Callable[[int, torch.Tensor], None]) -> None:
        """One pass over a window [tokens] that shows the rows of `queries`, layer by layer."""
        self._pass = Pass(queries.to(self.device), see)
        self.model.base_model(input_ids=ids[None].to(self.device), use_cache=False)

    @torch.inference_mode()
    def reference(self, ids: torch.Tensor, rest: int, see: Callable[[int, torch.Tensor], None]) -> torch.Tensor:
        """Log-probabilities of the last `rest` rows of a window, [rest, vocabulary] float32; their attention is seen,
        and what comes before is kept for `pruned`."""
        tokens = len(ids)
        self._prefix.clear()
        self._pass = Pass(torch.arange(tokens - rest, tokens, device=self.device), see, tokens - rest)
        out = self.model(input_ids=ids[None].to(self.device), use_cache=False, logits_to_keep=rest)
        self._keep_inputs(ids, rest)
        return out.logits[0].float().log_softmax(-1)

    def _keep_inputs(self, ids: torch.Tensor, rest: int) -> None:
        """What each layer is given in a pass over the rest in which every layer reads everything."""
        self._inputs.clear()

        def keep(layer: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self._inputs.append(args[0])

        hooks = [layer.register_forward_pre_hook(keep) for layer in self.model.base_model.layers]
        try:
            self.pruned(ids, rest, {})
        finally:
            for hook in hooks:
                hook.remove()

    @torch.inference_mode()
    def pruned(self, ids: torch.Tensor, rest: int, masks: dict[int, torch.Tensor]) -> torch.Tensor:
        """As `reference` for the window that it last saw, with the given layers reading a part of it.

        The pass begins at the first of these layers: those before it would do again what they did for `reference`.
        """
        tokens = len(ids)
        rows = torch.arange(tokens - rest, tokens, device=self.device)
        causal = torch.arange(tokens, device=self.device) <= rows[:, None]
        self._pass = Pass(masks=masks, causal=causal[None])
        layers, first = self.model.base_model.layers, min(masks, default=0)
        given = {"inputs_embeds": self._inputs[first]} if masks else {"input_ids": ids[None, -rest:].to(self.device)}
        self.model.base_model.layers = layers[first:]
        try:
            out = self.model(**given, position_ids=rows[None], use_cache=False)
        finally:
            self.model.base_model.layers = layers
        return out.logits[0].float().log_softmax(-1)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """query [1, query heads, rows, size], key and value [1, KV heads, rows, size]; like query."""
        now = self._pass
        if now.masks is not None:
            key, value = (torch.cat((old, new), 2) for old, new in zip(self._prefix[layer], (key, value), strict=True))
            mask = now.masks.get(layer, now.causal)
            if len(mask) > 1:
                mask = mask.repeat_interleave(query.shape[1] // len(mask), 0)
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask[None], scale=scaling, enable_gqa=True
            )
        if now.see is not None:
            now.see(layer, rows_of(query[0], key[0], now.queries, scaling))
        if now.keep_prefix:
            self._prefix[layer] = key[:, :, : now.keep_prefix], value[:, :, : now.keep_prefix]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)


def _attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
    out = module.calibrated_model.attend(module.layer_idx, query, key, value, scaling)
    return out.transpose(1, 2).contiguous(), None


def find(role: str, name: str) -> Path:
    """The folder of a model: the demo pair's, a folder, or one that the Hugging Face hub has."""
    if (folder := Path(model_folder(role, name))).is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--{role} {name}: neither a folder nor a model of the Hugging Face hub ({reason})") from None


def check(folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """The configuration of each model; UserError for what cannot be calibrated."""
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
            f"target and draft have vocabularies of {sizes[0]} and {sizes[1]} tokens: drafting needs the same; use a "
            "draft of the target's family"
        )
    return configs


def tokenizer_of(folders: dict[str, Path]) -> Any:
    """The tokenizer that both models share; UserError if they do not."""
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
