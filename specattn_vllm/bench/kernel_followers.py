"""What a source of layers that copy costs a round, beside its selection."""

from __future__ import annotations

from functools import partial

import torch

from specattn_vllm.bench import kernel_shapes as shapes
from specattn_vllm.bench.kernel_bench import Bench, Calls
from specattn_vllm.bench.kernel_data import realistic_mass
from specattn_vllm.bench.kernel_report import Row
from specattn_vllm.bench.kernel_shapes import VERIFY_LEN, Batch

VOCABULARY = 1000
"""So small that a round's tokens occur often; how often changes nothing."""


def followers(bench: Bench, batch: Batch, groups: int) -> Row:
    """Mass of one draft layer, taken over with more of it where a round's tokens are followed."""
    rows, context = batch.rows, batch.context

    def make() -> Calls:
        device = bench.device
        mass = realistic_mass(rows * groups, context, device).view(1, rows, groups, context)
        ids = torch.randint(0, VOCABULARY, (rows, context), dtype=torch.int32, device=device)
        tokens = torch.randint(0, VOCABULARY, (rows, VERIFY_LEN), device=device)
        lens = torch.full((rows,), context - VERIFY_LEN, dtype=torch.int32, device=device)
        source = torch.zeros(1, dtype=torch.int64, device=device)
        slots = torch.arange(rows, device=device)
        operation = bench.operation("add_followers")
        return [partial(operation, mass, lens, torch.empty_like(mass), source, ids, slots, tokens)]

    nbytes = rows * context * (groups * 2 * shapes.MASS_BYTES + shapes.ID_BYTES)
    return bench.measure("select", "what follows a round's tokens", f"{batch} {rows * groups} rows", make, nbytes)
