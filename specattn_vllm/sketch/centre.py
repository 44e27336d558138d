"""The mean key of each layer and head, measured once when an engine starts.

This mean is the *centre*; it is subtracted from all keys before they are encoded. That changes no selection, because it
changes all scores of a query by the same amount. The centre should be near the mean of the keys, so that the few levels
of the codes serve the differences between keys, and it must be the same for all codes of a cache. So it is measured on
random tokens before the cache exists: no text or tokenizer is needed, every start gives the same centre, and the codes
in the cache stay valid. SmolLM2-135M, 12.5% of 4,096 tokens: KL to dense is 0.0068 with this centre, 0.0065 with that
of another document, 0.0060 with the document's own, and 0.0071 without a centre.

In hybrid models, layers of linear attention and Mamba add nothing during the measurement: they have no state yet, and
vLLM leaves their outputs undefined. Their centres are therefore those of a somewhat different model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.mamba.abstract import MambaBase

from specattn_vllm import compat
from specattn_vllm.sketch.layer import attend_densely

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from specattn_vllm.sketch.layer import LayerSketch

TOKENS = 1024
SEED = 7


def measure_centres(
    model: Callable[..., object],
    layers: Iterable[LayerSketch],
    vllm_config: VllmConfig,
    device: torch.device,
) -> None:
    """Run a loaded model over random tokens, and set the centre of each layer to its mean key. `layers`: the sketches
    that the implementations of the model's layers hold."""
    layers = list(layers)
    tokens = min(TOKENS, vllm_config.scheduler_config.max_num_batched_tokens, vllm_config.model_config.max_model_len)
    generator, vocabulary = torch.Generator().manual_seed(SEED), vllm_config.model_config.get_vocab_size()
    ids = torch.randint(0, vocabulary, (tokens,), generator=generator, dtype=torch.int32)
    for layer in layers:
        layer.probing = True
    try:
        context = set_forward_context(None, vllm_config, num_tokens=tokens, slot_mapping={}, skip_compiled=True)
        with torch.inference_mode(), context, _others_attend(vllm_config):
            positions = torch.arange(tokens, dtype=torch.int64, device=device)
            model(input_ids=ids.to(device), positions=positions)
    finally:
        for layer in layers:
            layer.probing = False


@contextmanager
def _others_attend(vllm_config: VllmConfig) -> Iterator[None]:
    """Layers with a sliding window are vLLM's own. Without a cache they leave their output empty, so they are made to
    attend here: the keys of the layers behind them are then those of the model. Layers without attention add
    nothing."""
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase).values()
    others = [layer for layer in layers if hasattr(layer, "impl") and not compat.is_our_layer(layer)]
    stateful = [layer for layer in layers if isinstance(layer, MambaBase)]
    rounding = [getattr(layer, "query_quant", None) for layer in others]
    for layer in others:
        layer.impl.forward = partial(_attend_in_window, layer)
        layer.query_quant = None  # with an fp8 cache, vLLM rounds the queries of its own backends
    for layer in stateful:
        layer.forward = partial(_add_nothing, inspect.signature(layer.forward))
    try:
        yield
    finally:
        for layer in stateful:
            del layer.forward
        for layer, query_quant in zip(others, rounding, strict=True):
            del layer.impl.forward  # the class has it
            layer.query_quant = query_quant


def _add_nothing(signature: inspect.Signature, *args: Any, **kwargs: Any) -> torch.Tensor:
    """In the place of the `forward` of a layer without attention, which returns its output or fills `output`."""
    given = signature.bind(*args, **kwargs).arguments
    if given.get("output") is not None:
        return given["output"].zero_()
    return torch.zeros_like(given["hidden_states"])


def _attend_in_window(
    layer: Any,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    attn_metadata: Any,
    output: torch.Tensor,
    **scales: Any,
) -> torch.Tensor:
    """In the place of an implementation's `forward`, whose arguments it takes after `layer`."""
    del module, kv_cache, attn_metadata, scales
    window, size, sinks = layer.sliding_window, layer.impl.head_size, getattr(layer.impl, "sinks", None)
    more = {"sinks": sinks, "soft_cap": getattr(layer.impl, "logits_soft_cap", None) or None}
    attend_densely(query, key, value, layer.impl.scale, output, head_size=size, window=window, **more)
    return output
