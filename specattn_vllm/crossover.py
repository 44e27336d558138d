"""Where choosing costs more than it saves, the target reads everything."""

from __future__ import annotations

from specattn_vllm.executors import Operations
from specattn_vllm.options import SpecAttnOptions

# Context tokens of a batch, summed over its requests, from which on pruning pays. H200, Llama-8B with 1B shapes, bf16,
# K = 5, 2026-11-26 (docs/benchmarks.md, "Stepping aside"). Milliseconds of a round with `sparse_draft`: all read, 11.03
# for one request of 512 tokens, 11.45 of 4k, 12.48 for four of 4k; a quarter, 11.47, 11.67 and 12.52; a tenth, 11.42,
# 11.56 and 12.21. One of 32k takes 12.78 with a quarter, and 13.80 with method 'dense'; with a draft that reads
# everything a quarter saves 0.1 there.
MEASURED = {"fa3": 32768}
# The same of a target that drafts for itself. Not measured: below it, drafts that read nothing at all would save a
# thirtieth of what a step of an 8B model reads. A sparse draft model pays in the smallest batch that was measured, one
# request of 512 tokens: 11.09 ms, and 11.29 with a draft that reads everything.
OF_ITSELF = {"fa3": 4096}


def crossover_tokens(options: SpecAttnOptions, operations: Operations) -> int:
    """Context tokens of a batch below which nothing is pruned: the option's, else the executor's, else 0."""
    if options.crossover_tokens is not None:
        return options.crossover_tokens
    if options.drafts_for_itself:
        return OF_ITSELF.get(operations.name, 0)
    return 0 if options.is_lossless else MEASURED.get(operations.name, 0)
