"""Tiny models of the architectures that people serve, with random weights, made by transformers.

python tests/engine/families.py FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 512
WINDOW = 32
ALTERNATING = ["sliding_attention", "sliding_attention", "full_attention"] * 2

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
WINDOWED = {"num_hidden_layers": 6, "sliding_window": WINDOW, "layer_types": ALTERNATING}
EVERY_SECOND = {"layer_types": ["sliding_attention", "full_attention"] * 3}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}

# A hybrid: layers of linear attention keep a state in the place of keys and values.
LINEAR = {f"linear_{name}": size for name, size in (("num_key_heads", 2), ("num_value_heads", 4))}
LINEAR |= {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "linear_conv_kernel_dim": 4}
MIXED = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}

# Hybrids with a Mamba-2 state or a short convolution.
MAMBA = {f"mamba_{name}": size for name, size in (("n_heads", 8), ("d_head", 64), ("d_state", 64), ("n_groups", 1))}
MAMBA |= {"mamba_chunk_size": 64}
NEMOTRON = {"mamba_num_heads": 8, "mamba_head_dim": 64, "ssm_state_size": 64, "n_groups": 1, "chunk_size": 64}
# As files of such models have them, and transformers' class has not.
SHORT = {f"block_{name}": value for name, value in (("dim", 256), ("ff_dim", 384), ("multiple_of", 64))}
SHORT |= {"block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False, "conv_dim": 256, "conv_dim_out": 256}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # Other head sizes: 256, 96 and 192.
    "gemma": ("GemmaConfig", {"head_dim": 256, "tie_word_embeddings": True}),
    "phi3-mini": ("Phi3Config", {"hidden_size": 384, "head_dim": 96}),
    "nemotron": ("NemotronConfig", {"head_dim": 192}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "qwen3-moe": ("Qwen3MoeConfig", EXPERTS),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "phi": ("Phi3Config", {"partial_rotary_factor": 0.5}),
    "glm4": ("Glm4Config", {"partial_rotary_factor": 0.5}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", WINDOWED),
    "gemma3": ("Gemma3TextConfig", WINDOWED | {"query_pre_attn_scalar": 64, "tie_word_embeddings": True}),
    # Caps so low that they matter: they are 50 in Gemma 2.
    "gemma2": (
        "Gemma2Config",
        WINDOWED | {"query_pre_attn_scalar": 64, "tie_word_embeddings": True, "attn_logit_softcapping": 2.0},
    ),
    "cohere2": ("Cohere2Config", WINDOWED | {"tie_word_embeddings": True}),
    "exaone4": ("Exaone4Config", WINDOWED),
    # With attention sinks, in layers with and without a window.
    # vLLM gives every second layer of gpt-oss a window, whatever the configuration says.
    "gpt-oss": ("GptOssConfig", WINDOWED | EVERY_SECOND | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite": ("GraniteConfig", WINDOWED | {"attention_sinks": True, "attention_multiplier": 0.125}),
    "qwen3-next": (
        "Qwen3NextConfig",
        MIXED | LINEAR | EXPERTS | {"partial_rotary_factor": 0.25, "shared_expert_intermediate_size": 64},
    ),
    "qwen3.5": (
        "Qwen3_5TextConfig",
        MIXED
        | LINEAR
        | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25, "mrope_section": [4, 2, 2]}},
    ),
    "nemotron-h": (
        "NemotronHConfig",
        NEMOTRON | {"num_hidden_layers": 6, "layers_block_type": ["mamba", "mlp", "attention"] * 2},
    ),
    "granite4": (
        "GraniteMoeHybridConfig",
        MAMBA
        | MIXED
        | {"layer_types": ["mamba", "attention"] * 2, "num_local_experts": 0, "attention_multiplier": 0.125},
    ),
    # Each layer has both attention and Mamba.
    "falcon-h1": ("FalconH1Config", MAMBA | {"num_hidden_layers": 2, "mamba_d_ssm": 512}),
    "lfm2": ("Lfm2Config", SHORT | {"num_hidden_layers": 5, "layer_types": ["conv", "full_attention"] * 2 + ["conv"]}),
}
"""Name -> the class of its configuration in transformers, and what differs from SHAPE."""

VISION = {"hidden_size": 64, "intermediate_size": 64}
MULTIMODAL: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # Positions of three kinds, interleaved.
    "qwen3-vl": (
        "Qwen3VLConfig",
        {"rope_parameters": {"rope_type": "default", "mrope_section": [12, 10, 10], "mrope_interleaved": True}},
        {"depth": 1, "num_heads": 2, "out_hidden_size": 256, "deepstack_visual_indexes": [0]},
    ),
    "gemma3-vl": (
        "Gemma3Config",
        WINDOWED | {"query_pre_attn_scalar": 64},
        {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    ),
}
"""Name -> the same, and the configuration of what sees images."""


def _randomise(model: torch.nn.Module) -> None:
    """Attention that is far from uniform, and layers that add more than the embedding, so that tokens differ."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() < 2 or "norm" in name:
            continue
        gain = 1.6 if any(part in name for part in ("q_proj", "k_proj", "qkv_proj")) else 1.0
        gain *= 0.1 if "embed" in name else 1.0
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * gain * weight.shape[-1] ** -0.5)


def _draw_sinks(model: torch.nn.Module) -> None:
    """As heavy as some tokens together. transformers' Granite has no sinks, but saves what it is given."""
    generator = torch.Generator().manual_seed(1)
    for name, module in model.named_modules():
        if name.endswith(".self_attn") and (
            hasattr(module, "sinks") or getattr(model.config, "attention_sinks", False)
        ):
            values = 2 + torch.randn(model.config.num_attention_heads, generator=generator)
            module.sinks = torch.nn.Parameter(values)


def make(name: str, folder: Path) -> str:
    import transformers

    if name in MULTIMODAL:
        config_class, changes, vision = MULTIMODAL[name]
        config = getattr(transformers, config_class)(text_config=SHAPE | changes, vision_config=VISION | vision)
        model = transformers.AutoModelForImageTextToText.from_config(config)
    else:
        config_class, changes = FAMILIES[name]
        config = getattr(transformers, config_class)(**SHAPE | changes)
        model = transformers.AutoModelForCausalLM.from_config(config)
    _randomise(model)
    _draw_sinks(model)
    model.float().save_pretrained(folder)
    return str(folder)


MODELS: dict[str, Callable[[Path], str]] = {name: (lambda folder, name=name: make(name, folder)) for name in FAMILIES}

if __name__ == "__main__":
    for name in FAMILIES:
        print(make(name, Path(sys.argv[1]) / name))
