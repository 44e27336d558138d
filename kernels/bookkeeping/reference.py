"""PyTorch versions of ``kernels.py``, with the same contracts."""

from __future__ import annotations

import time

import torch

from ..contracts import checked
from . import contracts
from .contracts import NO_SELECTION, Round


@checked(contracts.take_selections)
def take_selections(slots, query_start_loc, seq_lens, prefilling, prefix_lens, usable, stored) -> None:
    ours = slots >= 0
    stored.copy_(torch.where(ours, prefix_lens[slots], -1))
    computed = seq_lens - (query_start_loc[1:] - query_start_loc[:-1])
    usable.copy_(torch.where((stored == computed) & ~prefilling, stored, -1))
    prefix_lens[slots[ours & prefilling]] = -1


@checked(contracts.count_reads)
def count_reads(slots, seq_lens, prefilling, usable, stored, kept, layers_of, heads, layers, dense_layers, out) -> None:
    verifies = (slots >= 0) & ~prefilling
    sparse, nothing = verifies & (usable >= 0), verifies & (stored == NO_SELECTION)
    per_row = (kept.sum(dim=2, dtype=torch.int64) * layers_of[:, None]).sum(dim=0) * (heads // kept.shape[2])
    everything = torch.where(verifies, seq_lens, 0).sum(dtype=torch.int64) * heads
    amounts = (
        sparse.sum(),
        nothing.sum(),
        (verifies & ~sparse & ~nothing).sum(),
        torch.where(verifies, per_row, 0).sum() + everything * dense_layers,
        everything * layers,
    )
    torch.stack(amounts, out=out)


@checked(contracts.count_sampled)
def count_sampled(num_sampled, verified, total) -> None:
    total += (num_sampled if verified is None else num_sampled * verified).sum()


# On a CPU every operation is complete when it returns, so the host's clock is the device's.
@checked(contracts.start_clock)
def start_clock(began) -> None:
    began.fill_(time.perf_counter_ns())


@checked(contracts.stop_clock)
def stop_clock(began, times, total) -> None:
    total += times * (time.perf_counter_ns() - began)


@checked(contracts.load_round)
def load_round(given: Round, held: Round, reqs: int, rows: int, query_len: int) -> None:
    for name, source, target in zip(Round._fields, given, held, strict=True):
        if name in ("last_sampled", "temperature", "seeds"):
            target.copy_(source[: target.shape[0]])
            continue
        per_row = query_len if name in ("input_ids", "positions") else 1
        target[: reqs * per_row].copy_(source[: reqs * per_row])
        target[reqs * per_row : rows * per_row].fill_(-1 if name == "idx_mapping" else 0)
