"""Where choosing costs more than it saves, a round reads everything."""

from __future__ import annotations

from specattn_vllm.executors import Operations
from specattn_vllm.options import SpecAttnOptions

# Context tokens of a batch, summed over its requests, at which pruning starts to pay. H200, Llama-8B with 1B shapes,
# bf16, K = 5, 2026-11-26 (docs/results/h200-engine.json), a round with a quarter read and 'sparse_draft' against method
# 'dense': 11.9 ms and 11.5 with one request of 4k, 12.7 and 12.5 with four, 13.0 and 13.6 with one of 32k, 14.7 and
# 16.5 with 16 of 4k.
MEASURED = {"fa3": 32768}
# The same where verification reads everything anyway, and drafting alone a part: 10.7 ms and 11.5 with one request of
# 4k, the smallest cell (`sparse-draft` against `dense`).
MEASURED_DRAFTING = {"fa3": 4096}


def crossover_tokens(options: SpecAttnOptions, operations: Operations) -> int:
    """Context tokens of a batch below which nothing is pruned: the option's, else the executor's, else 0."""
    if options.crossover_tokens is not None:
        return options.crossover_tokens
    return (MEASURED_DRAFTING if options.is_lossless else MEASURED).get(operations.name, 0)
