"""What scripts/trust/drift.py changes in an engine: who drafts, and which steps are dense."""

import functools
from collections import Counter
from contextlib import contextmanager
from unittest.mock import patch

from specattn_vllm.evaluation.forcing import Forcing


@contextmanager
def dense_every(steps: int):
    """Inside, each of that many steps of a request reads everything, as if it had asked for it."""
    from specattn_vllm.backend.target_choice import TargetChoice

    begin, taken = TargetChoice._begin, Counter()

    def counted(choice, common):
        if not choice.dummy:
            for row, slot in enumerate(common.req_idx.tolist()):
                taken[slot] += not common.is_prefilling[row]
                choice.exact[slot] = taken[slot] % steps == 0
        return begin(choice, common)

    with patch.object(TargetChoice, "_begin", counted):
        yield


@contextmanager
def drafting(forcing: Forcing):
    """Inside, what vLLM's n-gram drafter proposes are the next tokens of the texts that `forcing` holds."""
    from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator

    @functools.wraps(NgramGPUSpeculator.propose)  # the plugin asks for the names of its arguments
    def the_text(speculator, input_batch, *args, dummy_run=False, **others):
        drafts, slots = speculator.drafts[: input_batch.num_reqs], input_batch.idx_mapping
        if not dummy_run:
            last = speculator.req_states.total_len.gpu[slots] - 1
            for step in range(drafts.shape[1]):
                drafts[:, step] = forcing._draft(drafts[:, step], last + step, slots)
        return drafts

    with patch.object(NgramGPUSpeculator, "propose", the_text):
        yield
