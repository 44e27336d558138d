"""Which rows of a verification leave their scores: kernel and reference equal to a plain-Python oracle."""

from __future__ import annotations

import random

import pytest
import torch

from specattn_vllm.kernels import reference
from specattn_vllm.kernels.selection.mass import mark_rows

OPS = pytest.mark.parametrize("mark", [mark_rows, reference.mark_rows], ids=["kernel", "reference"])


@OPS
@pytest.mark.parametrize(("rows", "capacity"), [(0, 3), (1, 1), (5, 8), (300, 301)])
@pytest.mark.parametrize("longest", [1, 5])
def test_first_and_last_rows_and_what_they_rank(mark, rows, capacity, longest, device):
    rng = random.Random(rows)
    lens = [rng.choice([0, rng.randint(40, 9000)]) for _ in range(rows)]
    # A padded row of a graph has as many query tokens as the others.
    query = [rng.randint(1, 2 * longest) if rng.random() < 0.8 else 0 for _ in lens]
    starts = [sum(query[:r]) for r in range(rows + 1)]
    scored = torch.full((capacity, 2), 99, dtype=torch.int64, device=device)
    ranked = torch.full((capacity,), 99, dtype=torch.int32, device=device)
    mark(
        torch.tensor(starts, dtype=torch.int32, device=device),
        torch.tensor(lens, dtype=torch.int32, device=device), longest, scored, ranked,
    )  # fmt: skip
    for r in range(capacity):
        if r >= rows or not lens[r] or not query[r]:
            assert scored[r].tolist() == [-1, -1] and ranked[r] == 0
            continue
        prompt = query[r] > longest
        first = starts[r + 1] - 1 if prompt else starts[r]
        assert scored[r].tolist() == [first, starts[r + 1] - 1]
        # Of a verification the first row's own token is the last that is certain.
        assert ranked[r] == (lens[r] if prompt else lens[r] - query[r] + 1)


@OPS
def test_wrong_arguments_are_refused(mark, device):
    starts = torch.zeros(3, dtype=torch.int32, device=device)
    lens, scored, ranked = starts[:2], torch.zeros(2, 2, dtype=torch.int64, device=device), starts[:2].clone()
    for changed, name in (
        ((starts[:2], lens, 5, scored, ranked), "query_start_loc"),
        ((starts, lens.long(), 5, scored, ranked), "seq_lens"),
        ((starts, lens, 0, scored, ranked), "max_query_len"),
        ((starts, lens, 5, scored[:1], ranked[:1]), "lens"),
        ((starts, lens, 5, scored[:, :1], ranked), "scored_rows"),
    ):
        with pytest.raises(ValueError, match=name):
            mark(*changed)
