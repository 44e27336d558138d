"""PyTorch versions of the kernels: the oracle of their tests, and the code that runs where there is no GPU.

Each function has the signature of its Triton twin; shapes, dtypes, padding rules and errors are stated there, once
(``draft_attention.py``, ``accumulate_mass.py``, ``dilate_mass.py``, ``add_followers.py``, ``top_p.py``,
``page_tables.py``, ``sparse_attention.py``).
Scores and softmax are computed in fp32. They loop over requests, because requests differ in length and a padded batch
would spend most of its time on padding, and over nothing else.

They read lengths with ``.tolist()``, so they would wait for the device on a GPU; there they are for tests only.
"""

from .attention import accumulate_mass, dense_attention, draft_attention, sparse_attention
from .bookkeeping import count_reads, count_sampled, load_round, mark_rows, take_selections
from .selection import (
    add_followers,
    build_block_tables,
    build_page_tables,
    build_positions,
    dilate_mass,
    select_top_p,
    unpack_bits,
)

__all__ = [
    "accumulate_mass",
    "add_followers",
    "build_block_tables",
    "build_page_tables",
    "build_positions",
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
