"""The launchers of all Triton kernels, under the names that their PyTorch references have in ``reference.py``."""

from .attention.draft_attention import draft_attention
from .attention.sparse_attention import sparse_attention
from .bookkeeping.kernels import count_reads, count_sampled, load_round, take_selections
from .selection.accumulate_mass import accumulate_mass
from .selection.block_tables import build_block_tables
from .selection.dilate_mass import dilate_mass
from .selection.mark_rows import mark_rows
from .selection.page_tables import build_page_tables
from .selection.top_p import select_top_p
from .sketch.cuts import carry_thresholds, cut_scores
from .sketch.encode import encode_keys
from .sketch.pages import list_pages
from .sketch.queries import prepare_queries
from .sketch.scores import score_tokens

__all__ = [
    "accumulate_mass",
    "build_block_tables",
    "build_page_tables",
    "carry_thresholds",
    "count_reads",
    "count_sampled",
    "cut_scores",
    "dilate_mass",
    "draft_attention",
    "encode_keys",
    "list_pages",
    "load_round",
    "mark_rows",
    "prepare_queries",
    "score_tokens",
    "select_top_p",
    "sparse_attention",
    "take_selections",
]
