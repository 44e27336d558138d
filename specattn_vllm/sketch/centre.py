"""The mean key of each layer and head, measured once when an engine starts.

This mean is the *centre*; it is subtracted from all keys before they are encoded. That changes no selection, because it
changes all scores of a query by the same amount. The centre should be near the mean of the keys, so that the few levels
of the codes serve the differences between keys, and it must be the same for all codes of a cache. So it is measured on
random tokens before the cache exists: no text or tokenizer is needed, every start gives the same centre, and the codes
in the cache stay valid. SmolLM2-135M, 12.5% of 4,096 tokens: KL to dense is 0.0068 with this centre, 0.0065 with that
of another document, 0.0060 with the document's own, and 0.0071 without a centre.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from vllm.forward_context import set_forward_context

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from specattn_vllm.sketch.layer import LayerSketch

TOKENS = 1024
SEED = 7


def measure_centres(
    model: Callable[..., object],
    layers: Iterable[LayerSketch],
    vllm_config: VllmConfig,
    vocab_size: int,
    device: torch.device,
) -> None:
    """Run a loaded model over random tokens, and set the centre of each layer to its mean key. `layers`: the sketches
    that the implementations of the model's layers hold."""
    layers = list(layers)
    tokens = min(TOKENS, vllm_config.scheduler_config.max_num_batched_tokens, vllm_config.model_config.max_model_len)
    ids = torch.randint(0, vocab_size, (tokens,), generator=torch.Generator().manual_seed(SEED), dtype=torch.int32)
    for layer in layers:
        layer.probing = True
    try:
        context = set_forward_context(None, vllm_config, num_tokens=tokens, slot_mapping={}, skip_compiled=True)
        with torch.inference_mode(), context:
            positions = torch.arange(tokens, dtype=torch.int64, device=device)
            model(input_ids=ids.to(device), positions=positions)
    finally:
        for layer in layers:
            layer.probing = False
