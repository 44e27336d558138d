"""What the mean of the tokens that are not read costs a layer of a verification, beside its attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from specattn_vllm.bench.kernel_bench import Bench, Calls
from specattn_vllm.bench.kernel_data import Requests
from specattn_vllm.bench.kernel_report import Row
from specattn_vllm.bench.kernel_shapes import VERIFY_LEN, Batch, Heads


def unread(bench: Bench, batch: Batch, heads: Heads, req: Requests, layers: Sequence[torch.Tensor]) -> Row:
    """Sums taken further by the tokens of a verification, and the mean mixed in, as in every round but a request's
    first. Kept tokens are a tenth: how many they are changes nothing but the weight."""

    def make() -> Calls:
        add_unread = bench.operation("add_unread")
        device, rows = bench.device, batch.rows
        shape = (rows, heads.kv)
        sums = torch.randn((*shape, 2 * heads.size), dtype=torch.float32, device=device)
        # So many that a call takes the same step each time: what it adds is put back by the next one's count.
        summed = torch.full(shape, batch.context - VERIFY_LEN, dtype=torch.int32, device=device)
        lens = torch.full((rows,), batch.context, dtype=torch.int32, device=device)
        kept = torch.full((rows, 1), max(batch.context // 10, 1), dtype=torch.int32, device=device)
        slots = torch.arange(rows, dtype=torch.int64, device=device)
        lse = torch.zeros((rows * VERIFY_LEN, heads.query), dtype=torch.float32, device=device)
        req.out.zero_()

        def one(layer: torch.Tensor) -> Callable[[], None]:
            add = partial(
                add_unread, req.query, req.out, lse, layer, req.block_table, lens, req.seq_lens, kept, slots, sums,
                summed, req.query_start_loc, heads.size**-0.5, VERIFY_LEN,
            )  # fmt: skip

            def call() -> None:
                summed.fill_(batch.context - VERIFY_LEN)
                add()

            return call

        return [one(layer) for layer in layers]

    rows, row = batch.rows, 2 * heads.size * heads.kv
    new, read = VERIFY_LEN * row * bench.element, 2 * row * 4  # the new tokens, and the sums: read and written
    outputs = 3 * VERIFY_LEN * heads.query * heads.size * bench.element  # query and output read, output written
    return bench.measure(
        "verify", "mean of what is not read", f"{batch} {heads} q{VERIFY_LEN}", make, rows * (new + read + outputs)
    )
