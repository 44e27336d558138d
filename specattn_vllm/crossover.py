"""Where choosing costs more than it saves, everything is read."""

from __future__ import annotations

from specattn_vllm.executors import Operations
from specattn_vllm.options import SpecAttnOptions


def crossover_tokens(options: SpecAttnOptions, operations: Operations) -> int:
    """Context tokens of a batch below which the target reads everything, or a lossless method drafts with everything:
    the option's, else what the method measured for the executor, else 0."""
    if options.crossover_tokens is not None:
        return options.crossover_tokens
    alone = options.is_lossless and options.drafts_by_sketch
    measured = options.kind.draft_crossover if alone else options.kind.crossover
    return measured.get(operations.name, 0)
