"""Where choosing costs more than it saves, a round reads everything."""

from __future__ import annotations

from specattn_vllm.executors import Operations
from specattn_vllm.options import SpecAttnOptions

# Context tokens of a batch, summed over its requests, at which pruning starts to pay. H200, Llama-8B with 1B shapes,
# bf16, K = 5, 2026-11-22 (docs/results/h200-engine.json): with one request of 4k, the smallest cell, a round takes 11.5
# to 11.6 ms whether everything is read or 5 to 25% of it; from 4 requests of 4k on it is shorter where less is read.
MEASURED = {"fa3": 4096}


def crossover_tokens(options: SpecAttnOptions, operations: Operations) -> int:
    """Context tokens of a batch below which nothing is pruned: the option's, else the executor's, else 0."""
    if options.crossover_tokens is not None:
        return options.crossover_tokens
    return MEASURED.get(operations.name, 0)
