"""PyTorch versions of the kernels. The tests compare the kernels with them, and they run if there is no GPU.

Each is in the folder of its Triton kernel and has the same signature and contract; the kernel's file states what it
computes. Scores and softmax are computed in fp32. The only loops are over requests: requests differ in length, and a
padded batch would spend most of its time on padding.

They read lengths with ``.tolist()``, which waits for the device. So on a GPU they are for tests only.
"""

# ruff: noqa: F401 (each function that is imported here is offered under its name)

from types import FunctionType

from .attention.reference import dense_attention, draft_attention, sparse_attention
from .bookkeeping.reference import count_reads, count_sampled, load_round, start_clock, stop_clock, take_selections
from .guarantee.reference import bound_lost, sample_unread
from .selection.reference import (
    accumulate_mass,
    build_block_tables,
    build_page_tables,
    dilate_mass,
    mark_rows,
    select_top_p,
    unpack_bits,
)
from .sketch.reference import (
    carry_thresholds,
    cut_scores,
    encode_keys,
    list_pages,
    prepare_queries,
    score_tokens,
)

__all__ = [name for name, value in [*globals().items()] if isinstance(value, FunctionType)]
