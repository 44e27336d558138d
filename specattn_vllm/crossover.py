"""Where choosing costs more than it saves, the target reads everything."""

from __future__ import annotations

from specattn_vllm.executors import Operations
from specattn_vllm.options import SpecAttnOptions

# Context tokens of a batch, summed over its requests, from which on pruning pays. H200, Llama-8B with 1B shapes, bf16,
# K = 5, 2026-11-26 (docs/benchmarks.md, "Stepping aside"). Milliseconds of a round that verifies everything and of one
# that is pruned, with a draft that reads as much: of a tenth 11.37 and 11.56 for one request of 4k, 12.23 and 12.21 for
# four, 12.86 and 12.44 for one of 32k; of a quarter 11.45 and 11.67, and 12.48 and 12.52. With a draft that reads
# everything, one of 32k takes 13.79 and with a quarter 13.70.
MEASURED = {"fa3": 32768}
# The same of a target that drafts for itself. Not measured: below it, drafts that read nothing at all would save a
# thirtieth of what a step of an 8B model reads.
OF_ITSELF = {"fa3": 4096}
# Of a target that chooses for itself. By the times of its kernels (docs/sketch.md): a search of 32 layers and what it
# spares are about equal at two requests of 32k.
OF_SKETCH = {"fa3": 65536}
# Of drafts that are chosen so beside a target that reads everything: a 1B model's round of six steps and one search.
OF_SKETCHED_DRAFT = {"fa3": 16384}


def crossover_tokens(options: SpecAttnOptions, operations: Operations) -> int:
    """Context tokens of a batch below which the target reads everything, or a lossless method drafts with everything:
    the option's, else the executor's, else 0."""
    if options.crossover_tokens is not None:
        return options.crossover_tokens
    if options.drafts_for_itself:
        return OF_ITSELF.get(operations.name, 0)
    if options.uses_sketch:
        return OF_SKETCH.get(operations.name, 0)
    if options.drafts_by_sketch:
        return OF_SKETCHED_DRAFT.get(operations.name, 0)
    if options.is_lossless:
        return 0
    return MEASURED.get(operations.name, 0)
