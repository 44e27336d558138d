"""Where choosing costs more than it saves, a round reads everything."""

from __future__ import annotations

from specattn_vllm.executors import Operations
from specattn_vllm.options import SpecAttnOptions

# Context tokens of a batch, summed over its requests, at which pruning starts to pay. Not yet measured.
MEASURED: dict[str, int] = {}


def crossover_tokens(options: SpecAttnOptions, operations: Operations) -> int:
    """Context tokens of a batch below which nothing is pruned: the option's, else the executor's, else 0."""
    if options.crossover_tokens is not None:
        return options.crossover_tokens
    return MEASURED.get(operations.name, 0)
