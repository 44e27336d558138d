"""PyTorch versions of the kernels: the oracle of their tests, and the code that runs where there is no GPU.

Each lies beside its Triton twin, has its signature, and keeps its contract, which is stated there, once.
Scores and softmax are computed in fp32. They loop over requests, because requests differ in length and a padded batch
would spend most of its time on padding, and over nothing else.

They read lengths with ``.tolist()``, so they would wait for the device on a GPU; there they are for tests only.
"""

from .attention.reference import dense_attention, draft_attention, sparse_attention
from .bookkeeping.reference import count_reads, count_sampled, load_round, take_selections
from .selection.reference import (
    accumulate_mass,
    build_block_tables,
    build_page_tables,
    dilate_mass,
    mark_rows,
    select_top_p,
    unpack_bits,
)

__all__ = [
    "accumulate_mass",
    "build_block_tables",
    "build_page_tables",
    "count_reads",
    "count_sampled",
    "dense_attention",
    "dilate_mass",
    "draft_attention",
    "load_round",
    "mark_rows",
    "select_top_p",
    "sparse_attention",
    "take_selections",
    "unpack_bits",
]
