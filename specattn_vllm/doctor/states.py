"""What one request takes of a hybrid model's KV cache.

vLLM has pages of one size: blocks of tokens are made so long that a state of linear attention or Mamba fits into one,
and each state takes a page. Block numbers are shared by groups of layers of one kind, all as large as the smaller kind.
"""

from __future__ import annotations

import math
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def cache_of_a_request(config: VllmConfig, full: int, stateful: int, token: int) -> int:
    """Bytes for a request of `max_model_len` tokens, on one rank. full, stateful: layers that keep keys and values, and
    those that keep a state; token: bytes of a token in one layer, with its sketch."""
    cache = config.cache_config
    step = cache.block_size
    block = step * math.ceil(_state(config) / (step * token))
    if cache.mamba_cache_mode == "align":  # two states: the newest, and the last that the prefix cache may keep
        states = 2 + config.num_speculative_tokens
    else:
        states = 1 + config.num_speculative_tokens
    fewer, more = sorted((full, stateful))
    group = more if more < 1.5 * fewer else fewer  # as vLLM's own grouping: the last group is filled up
    pages = math.ceil(full / group) * math.ceil(config.model_config.max_model_len / block)
    pages += math.ceil(stateful / group) * states
    return pages * group * block * token


def _state(config: VllmConfig) -> int:
    """Bytes of one layer's state."""
    from vllm.model_executor.models import ModelRegistry

    model = config.model_config
    kind, _ = ModelRegistry.resolve_model_cls(model.architecture, model_config=model)
    shapes, dtypes = kind.get_mamba_state_shape_from_config(config), kind.get_mamba_state_dtype_from_config(config)
    return sum(prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True))
