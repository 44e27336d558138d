"""The mean key of each layer and head, measured once when an engine starts.

What is subtracted from the keys changes no choice: it adds the same to every score of a query. It only has to be near
their mean, so that the codes' few levels are spent on what tells keys apart, and the same for all codes of a cache. So
it is measured on random tokens before the cache exists: no text and no tokenizer are needed, every start gives the
same, and codes that are written already never come to mean something else. On SmolLM2-135M, 12.5% of 4,096 tokens, KL
to dense is 0.0068 with this centre, 0.0065 with that of another document, 0.0060 with the document's own and 0.0071
without.
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
    """Run a loaded model over random tokens, and set the centre of each of its layers to their mean key. The model's
    layers are those whose implementations hold the given sketches."""
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
