"""The launchers of all Triton kernels, under the names that their PyTorch references have in ``reference.py``.

They launch on the current stream, without waiting for the device.
"""

# ruff: noqa: F401 (each function that is imported here is offered under its name)

from types import FunctionType

from .attention.draft_attention import draft_attention
from .attention.sparse_attention import sparse_attention
from .bookkeeping.kernels import count_reads, count_sampled, load_round, start_clock, stop_clock, take_selections
from .guarantee.bound import bound_lost
from .guarantee.sample import sample_unread
from .selection.block_tables import build_block_tables
from .selection.mass import accumulate_mass, dilate_mass, mark_rows
from .selection.page_tables import build_page_tables
from .selection.top_p import select_top_p
from .sketch.cuts import carry_thresholds, cut_scores
from .sketch.encode import encode_keys
from .sketch.pages import list_pages
from .sketch.queries import prepare_queries
from .sketch.scores import score_tokens

__all__ = [name for name, value in [*globals().items()] if isinstance(value, FunctionType)]
