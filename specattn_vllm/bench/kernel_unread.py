"""The mean of the tokens that are not read, as a verification's attention is given it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from specattn_vllm.bench.kernel_bench import Bench
from specattn_vllm.bench.kernel_data import Requests
from specattn_vllm.bench.kernel_shapes import VERIFY_LEN, Batch, Heads
from specattn_vllm.kernels.unread_contracts import Mean


def means(
    bench: Bench, batch: Batch, heads: Heads, req: Requests, number: int
) -> tuple[list[Mean], Callable[[], object]]:
    """As many means, and what puts their counts back: each is then good for a call that takes its sums further by the
    tokens of a verification, as in every round but a request's first."""
    rows, device = batch.rows, bench.device
    before = max(batch.context - VERIFY_LEN, 0)
    sums = torch.randn((rows, heads.kv, 2 * heads.size), dtype=torch.float32, device=device)
    summed = torch.full((number, rows, heads.kv), before, dtype=torch.int32, device=device)
    lens = torch.full((rows,), batch.context, dtype=torch.int32, device=device)
    slots = torch.arange(rows, dtype=torch.int64, device=device)
    made = [Mean(req.block_table, lens, req.seq_lens, slots, sums, counts) for counts in summed]
    return made, lambda: summed.fill_(before)


def mean_bytes(batch: Batch, heads: Heads, element: int) -> int:
    """The new tokens are read, and the sums read and written."""
    row = 2 * heads.size * heads.kv
    return batch.rows * row * (VERIFY_LEN * element + 2 * 4)
