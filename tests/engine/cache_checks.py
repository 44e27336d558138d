"""What an engine's cache and buffers must hold, computed from the weights and from the keys alone."""

from __future__ import annotations

from typing import Any

import torch

from specattn_vllm.kernels.contracts import FP8
from specattn_vllm.kernels.sketch import reference

BUFFERS = {
    "Sketch": "packed factors histogram chunks cuts starts scores page_table following kept totals thresholds "
    "valid_lens slots dense rotation",
    "DraftSketch": "first_lens",
    "SelectionStore": "bits prefix_lens exact",
    "Pruner": "_page_table _kept _layers_of",
    "DraftCapture": "scores lse _rows _starts",
    "Ranking": "_mass _bits _counts",
    "TargetCapture": "scores lse mass bits counts scored_rows lens alone",
    "Window": "mass bits counts",
    "DraftTables": "_page_table _kept _rows",
}
"""Class -> tensors that keep their addresses as long as the engine lives."""


def buffers(runner: Any) -> dict[str, int]:
    """The address of each buffer of the plugin's."""
    found: dict[str, int] = {}

    def walk(path: str, thing: Any) -> None:
        for name in BUFFERS.get(type(thing).__name__, "").split():
            found[f"{path}.{name}"] = getattr(thing, name).data_ptr()
        for name in ("capture", "store", "pruner", "source", "tables", "ranking", "sketch"):
            if hasattr(thing, name) and not isinstance(thing, torch.Tensor):
                walk(f"{path}.{name}", getattr(thing, name))

    walk("target", getattr(runner, "specattn_chooser", None))
    walk("drafter", getattr(runner.speculator, "selection", None))
    return found


def by_slot(runner: Any) -> list[torch.Tensor]:
    """Copies of what is kept for each request, by its slot: budgets that layers share, and selections."""
    chooser, drafter = getattr(runner, "specattn_chooser", None), getattr(runner.speculator, "selection", None)
    store = getattr(drafter, "store", None)
    kept = [getattr(chooser, name, None) for name in ("totals", "thresholds")]
    kept += [getattr(store, "prefix_lens", None)]
    return [of[:-1].clone() for of in kept if of is not None]  # the last slot is nobody's


def first_layers(runner: Any, layers: dict[str, Any]) -> dict[str, Any]:
    """Layers whose keys and values depend on nothing but token and position: vLLM's name -> the model they are of. They
    are the target's first, and that of a draft model."""
    found = {"model.layers.0.self_attn.attn": runner.model.model}
    drafter = getattr(runner.speculator, "model", None)
    own = getattr(runner.speculator, "draft_attn_layer_names", None) or set()
    if drafter is not None and "draft_model.layers.0.self_attn.attn" in own:
        found["draft_model.layers.0.self_attn.attn"] = drafter.model
    assert found.keys() <= layers.keys(), [*layers]
    return found


def numbers(layer: Any) -> torch.Tensor:
    """A layer's cache. vLLM's tensor of an fp8 cache has bytes."""
    return layer.kv_cache.view(FP8) if layer.kv_cache.dtype == torch.uint8 else layer.kv_cache


@torch.inference_mode()
def keys(model: Any, layer: Any, tokens: list[int], blocks: torch.Tensor, offsets: torch.Tensor, what: str) -> None:
    """The first layer's keys and values of a request's first tokens lie where they belong."""
    device, length, first = layer.kv_cache.device, len(blocks), model.layers[0]
    hidden = first.input_layernorm(model.embed_tokens(torch.tensor(tokens[:length], device=device)))
    attention = first.self_attn
    q, k, v = attention.qkv_proj(hidden)[0].split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
    k = attention.rotary_emb(torch.arange(length, device=device), q, k)[1]
    cache = numbers(layer)[blocks.to(device), :, offsets.to(device)]
    expected = torch.cat([x.view(length, cache.shape[1], -1) for x in (k, v)], dim=-1)
    apart = (cache.float() - expected).abs()
    if cache.dtype == FP8:
        apart -= expected.abs() / 16 + 1e-3  # half of the distance between two numbers, at most
    apart = apart.amax((1, 2)) if length else torch.zeros(0)
    wrong = (apart > 1e-3).nonzero().flatten().tolist()
    assert not wrong, f"{what}: keys or values at positions {wrong} of {length} are not those of the tokens"


def codes(layer: Any, blocks: torch.Tensor, offsets: torch.Tensor, what: str) -> None:
    """The code of every token is that of the key in its slot."""
    choice, cache = layer.impl.choice, numbers(layer)
    blocks, offsets = blocks.to(cache.device), offsets.to(cache.device)
    have, scales = choice._views(cache)
    own = cache[blocks, :, offsets, : choice.sketch.head_size].to(choice.sketch.rotation.dtype).contiguous()
    fresh, worth = torch.zeros_like(have), torch.zeros_like(scales)
    slots = blocks * cache.shape[2] + offsets
    reference.encode_keys(own, slots, choice.sketch.rotation, choice.centre, fresh, worth)
    # A kernel may round an element on the border between two levels the other way.
    exact = choice.sketch.operations.name == "torch"
    apart = (have[blocks, :, offsets] != fresh[blocks, :, offsets]).sum(-1).amax(1)
    same = apart <= (0 if exact else 1)
    close = torch.isclose(scales[blocks, :, offsets], worth[blocks, :, offsets], rtol=0.0 if exact else 2e-3, atol=0)
    same &= close.flatten(1).all(1)
    assert same.all(), f"{what}: codes at {(~same).nonzero().flatten().tolist()} are not those of the keys"
