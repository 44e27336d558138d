"""Chooses the query rows of a verification whose scores are stored, and how many positions they rank.

For each request these are its first and its last query row: the first attends for the token that is drafted next, the
last for the tokens after the drafts. The choice does not depend on how many drafts will be accepted (Vegas, arXiv
2602.07223). Requests with more rows than a verification are prompts; for them it is the last row only.

query_start_loc  [R+1]    int32
seq_lens         [R]      int32, the step's own tokens included; 0 = padded row
max_query_len    int      most tokens of a verification
scored_rows      [M, 2]   int64, written, M >= R: rows of the query for ``draft_attention``; -1 for padded rows and from
                          R on
lens             [M]      int32, written: number of positions to rank, up to the first row's own token (for a prompt,
                          its last row's own token); newer tokens may be rejected. 0 for padded rows and from R on
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import contracts

BLOCK = 128


@triton.jit(do_not_specialize=["rows", "capacity", "max_query_len"])
def _mark_kernel(query_start_loc, seq_lens, scored_rows, lens, rows, capacity, max_query_len, BLOCK: tl.constexpr):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = r < rows
    begin = tl.load(query_start_loc + r, mask=inside, other=0)
    end = tl.load(query_start_loc + r + 1, mask=inside, other=0)
    length = tl.load(seq_lens + r, mask=inside, other=0)
    live = (end > begin) & (length > 0)
    first = tl.where(end - begin > max_query_len, end - 1, begin)
    tl.store(scored_rows + r * 2, tl.where(live, first, -1).to(tl.int64), mask=r < capacity)
    tl.store(scored_rows + r * 2 + 1, tl.where(live, end - 1, -1).to(tl.int64), mask=r < capacity)
    tl.store(lens + r, tl.where(live, length - (end - 1 - first), 0), mask=r < capacity)


def mark_rows(
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, max_query_len: int, scored_rows: torch.Tensor,
    lens: torch.Tensor,
) -> None:  # fmt: skip
    """Launch on the current stream, without waiting for the device; arguments as in the module's text."""
    contracts.mark_rows(query_start_loc, seq_lens, max_query_len, scored_rows, lens)
    capacity = lens.shape[0]
    if capacity == 0:
        return
    _mark_kernel[(triton.cdiv(capacity, BLOCK),)](
        query_start_loc, seq_lens, scored_rows, lens, seq_lens.shape[0], capacity, max_query_len, BLOCK=BLOCK
    )  # fmt: skip
