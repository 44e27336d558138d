"""Tiny models with made-up weights: targets, and for each kind of drafter of vLLM's one that fits a target.

    python tests/engine/tiny_models.py FOLDER

Nothing is trained, and yet most drafters are right often enough for tokens to be accepted as well as rejected. A target
has a strong first layer and weak ones after it, and embeddings of length one, which norms without weights leave as they
are. A head that looks at its token alone, through a copy of the target's layers, so says much what the target says.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

VOCABULARY = 512
WIDTH = 256
HEAD = 64
HEADS = 4
KV_HEADS = 2
INNER = 384
LAYERS = 3
WEAK = 0.2
"""Of what the first layer adds, how much each of the others does."""

Weights = dict[str, torch.Tensor]

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "float32",
}


def _save(folder: Path, config: dict, weights: Weights) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file({name: w.contiguous().clone() for name, w in weights.items()}, folder / "model.safetensors")
    return str(folder)


def _random(generator: torch.Generator, *shape: int, gain: float = 1.0) -> torch.Tensor:
    """A matrix that keeps the length of what it is applied to, times gain."""
    return torch.randn(*shape, generator=generator) * gain * shape[-1] ** -0.5


def _layer(generator: torch.Generator, strength: float) -> Weights:
    """One decoder layer. Its attention is far from uniform, so that a wrong page table or length changes the tokens."""
    q, kv = HEADS * HEAD, KV_HEADS * HEAD
    return {
        "input_layernorm.weight": torch.ones(WIDTH),
        "self_attn.q_proj.weight": _random(generator, q, WIDTH, gain=1.6),
        "self_attn.k_proj.weight": _random(generator, kv, WIDTH, gain=1.6),
        "self_attn.v_proj.weight": _random(generator, kv, WIDTH),
        "self_attn.o_proj.weight": _random(generator, WIDTH, q, gain=strength),
        "post_attention_layernorm.weight": torch.ones(WIDTH),
        "mlp.gate_proj.weight": _random(generator, INNER, WIDTH, gain=2.0),
        "mlp.up_proj.weight": _random(generator, INNER, WIDTH),
        "mlp.down_proj.weight": _random(generator, WIDTH, INNER, gain=strength),
    }


def _target() -> Weights:
    """The weights of all targets here, by Llama's names."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(VOCABULARY, WIDTH, generator=generator)
    weights = {
        "model.embed_tokens.weight": embedding / embedding.square().mean(1, keepdim=True).sqrt(),
        "model.norm.weight": torch.ones(WIDTH),
        "lm_head.weight": _random(generator, VOCABULARY, WIDTH),
    }
    for index in range(LAYERS):
        layer = _layer(generator, 1.0 if index == 0 else WEAK)
        weights |= {f"model.layers.{index}.{name}": w for name, w in layer.items()}
    return weights


def _first_layers(count: int, prefix: str = "layers.{}.") -> Weights:
    """Copies of the target's first layers, under other names."""
    return {
        prefix.format(index) + name.removeprefix(own): w
        for index in range(count)
        for name, w in _target().items()
        if name.startswith(own := f"model.layers.{index}.")
    }


def _ones(*names: str) -> Weights:
    """Norms that scale nothing."""
    return {name: torch.ones(WIDTH) for name in names}


def _takes_token() -> torch.Tensor:
    """What joins a token's embedding and a hidden state, in this order: it drops the hidden state."""
    return torch.cat((torch.eye(WIDTH), torch.zeros(WIDTH, WIDTH)), dim=1)


def target(folder: Path) -> str:
    return _save(folder, LLAMA, _target())


def draft_model(folder: Path) -> str:
    """The target without its last layer."""
    weights = {name: w for name, w in _target().items() if not name.startswith(f"model.layers.{LAYERS - 1}.")}
    return _save(folder, LLAMA | {"num_hidden_layers": LAYERS - 1}, weights)


def eagle(folder: Path) -> str:
    """EAGLE: layers of the target's, without a first and a last norm."""
    weights = {"fc.weight": _takes_token()} | _first_layers(LAYERS - 1)
    del weights["layers.0.input_layernorm.weight"]
    return _save(folder, LLAMA | {"num_hidden_layers": LAYERS - 1}, weights)


def eagle3(folder: Path) -> str:
    """EAGLE-3: one layer that sees the embedding beside hidden states of three of the target's layers. It has other KV
    heads than the target.

    The embedding gets to the residual through attention alone: queries and keys are both the embedding, so that a token
    attends to itself, and what it takes over is the embedding too."""
    config = LLAMA | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "num_key_value_heads": HEADS,
        "draft_vocab_size": VOCABULARY,
        "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
    }
    token = _takes_token()
    weights = _first_layers(1, "midlayer.") | _ones("midlayer.hidden_norm.weight", "norm.weight")
    weights |= {
        "midlayer.self_attn.q_proj.weight": token * 2,
        "midlayer.self_attn.k_proj.weight": token * 2,
        "midlayer.self_attn.v_proj.weight": token,
        "midlayer.self_attn.o_proj.weight": torch.eye(WIDTH),
        "fc.weight": torch.zeros(WIDTH, 3 * WIDTH),
    }
    return _save(folder, config, weights)


def mimo(folder: Path) -> str:
    """MiMo, which is Qwen2 with a module for multi-token prediction in the same checkpoint: `method: mtp`.

    Its configuration says Qwen2, because that of MiMo is code that comes with the published models."""
    config = LLAMA | {"model_type": "qwen2", "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    weights = _target()
    for index in range(LAYERS):
        for part, size in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            weights[f"model.layers.{index}.self_attn.{part}_proj.bias"] = torch.zeros(size * HEAD)
    module = "model.mtp_layers.0."
    weights |= {name.replace("layers.0.", "mtp_layers.0."): w for name, w in weights.items() if ".layers.0." in name}
    weights |= _ones(*(f"{module}{name}_layernorm.weight" for name in ("token", "hidden", "final")))
    weights[module + "input_proj.weight"] = _takes_token().roll(WIDTH, 1)  # here the hidden state comes first
    return _save(folder, config, weights)


def _parallel(architecture: str, **more) -> dict:
    """Configuration of a drafter that makes all drafts of a round at once."""
    return LLAMA | {
        "model_type": "qwen3",
        "architectures": [architecture],
        "num_hidden_layers": 2,
        "is_causal": False,
        **more,
    }


def _parallel_weights() -> Weights:
    weights = _first_layers(2) | _ones("hidden_norm.weight", "norm.weight")
    weights |= {f"layers.{i}.self_attn.{part}_norm.weight": torch.ones(HEAD) for i in range(2) for part in ("q", "k")}
    return weights | {"fc.weight": _random(torch.Generator().manual_seed(1), WIDTH, 2 * WIDTH)}


def dflash(folder: Path) -> str:
    """DFlash: attends to what it makes of the target's hidden states, and all of a round's drafts see each other."""
    extra = {"dflash_config": {"mask_token_id": VOCABULARY - 1, "target_layer_ids": [0, 2]}}
    return _save(folder, _parallel("DFlashDraftModel", **extra), _parallel_weights())


def dspark(folder: Path) -> str:
    """DSpark: DFlash with a bias for each token by the one before it."""
    generator = torch.Generator().manual_seed(2)
    extra = {"mask_token_id": VOCABULARY - 1, "target_layer_ids": [0, 2], "markov_rank": 16, "block_size": 4}
    heads = {
        "markov_head.markov_w1.weight": _random(generator, VOCABULARY, 16),
        "markov_head.markov_w2.weight": _random(generator, VOCABULARY, 16),
    }
    return _save(folder, _parallel("Qwen3DSparkModel", **extra), _parallel_weights() | heads)


def glm(folder: Path) -> str:
    """GLM-4 with mixtures of experts, and two modules for multi-token prediction, each of which makes one draft.

    vLLM's code asks for a layer with experts in the target too. All they add to what all tokens share is nothing."""
    modules, experts = 2, 2
    config = LLAMA | {
        "model_type": "glm4_moe",
        "architectures": ["Glm4MoeForCausalLM"],
        "partial_rotary_factor": 1.0,
        "attention_bias": False,
        "use_qk_norm": False,
        "num_nextn_predict_layers": modules,
        "first_k_dense_replace": LAYERS - 1,
        "n_routed_experts": experts,
        "num_experts_per_tok": 1,
        "n_shared_experts": 1,
        "moe_intermediate_size": INNER,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    }
    weights = _target()
    for module in (f"model.layers.{LAYERS + index}." for index in range(modules)):
        weights |= _first_layers(1, module)
        weights |= _ones(*(f"{module}{name}.weight" for name in ("enorm", "hnorm", "shared_head.norm")))
        weights[module + "eh_proj.weight"] = _takes_token()
        weights[module + "shared_head.head.weight"] = weights["lm_head.weight"]
    for mlp in (f"model.layers.{index}.mlp." for index in range(LAYERS - 1, LAYERS + modules)):
        for name in ("gate_proj.weight", "up_proj.weight", "down_proj.weight"):
            shared = weights.pop(mlp + name)
            weights[f"{mlp}shared_experts.{name}"] = shared
            weights |= {f"{mlp}experts.{expert}.{name}": torch.zeros_like(shared) for expert in range(experts)}
        weights[mlp + "gate.weight"] = torch.zeros(experts, WIDTH)
        weights[mlp + "gate.e_score_correction_bias"] = torch.zeros(experts)
    return _save(folder, config, weights)


MAKERS = (target, draft_model, eagle, eagle3, dflash, dspark, mimo, glm)
MODELS: dict[str, Callable[[Path], str]] = {maker.__name__: maker for maker in MAKERS}

if __name__ == "__main__":
    for name, maker in MODELS.items():
        print(maker(Path(sys.argv[1]) / name))
