"""The tensors of a round, and the argument checks of the operations in ``kernels.py``.

The checks refuse the same arguments as those of ``../contracts.py``, with the same messages. They test the common case
first, because these operations take a dozen small tensors each and run between steps, where the host's time counts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import contracts
from ..contracts import expect

INTEGERS = (torch.int32, torch.int64)
NO_SELECTION = -1  # stored instead of the length of a slot's selection
READ_COUNTS = ("sparse_rows", "no_selection_rows", "stale_rows", "kv_read", "kv_full")
"""Counters of ``count_reads``, in the order in which it writes them."""


class Round(NamedTuple):
    """The inputs of a round of drafting: two by token, four by row of the batch, three by request slot."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    seq_lens: torch.Tensor
    idx_mapping: torch.Tensor
    num_sampled: torch.Tensor
    num_rejected: torch.Tensor
    last_sampled: torch.Tensor
    temperature: torch.Tensor
    seeds: torch.Tensor


# dtypes in the order of `Round`: those of vLLM's tensors, and those of the tensors that a captured round reads.
GIVEN = (
    (torch.int32,), (torch.int64,), (torch.int32,), (torch.int64,), INTEGERS, INTEGERS, INTEGERS, (torch.float32,),
    (torch.int64,),
)  # fmt: skip
HELD = (
    (torch.int32,), (torch.int64,), (torch.int32,), (torch.int64,), (torch.int32,), (torch.int32,), (torch.int32,),
    (torch.float32,), (torch.int64,),
)  # fmt: skip


def vector(name: str, value, length: int | None, dtypes: tuple[torch.dtype, ...], device, longer: bool = False) -> None:
    """Check one vector. length: its exact length (None: any), or with `longer` its minimum length."""
    if isinstance(value, torch.Tensor) and value.dtype in dtypes and value.dim() == 1 and value.device == device:
        size = value.shape[0]
        fits = length is None or size == length or (longer and size > length)
        if fits and (size <= 1 or value.stride(0) == 1):
            return
    contracts.tensor(name, value, (None if longer else length,), dtypes, device)
    expect(False, name, f"{value.shape[0]} elements", f"{length} or more")


def _rows_and_device(slots) -> tuple[int, torch.device]:
    vector("slots", slots, None, (torch.int64,), getattr(slots, "device", None))
    return slots.shape[0], slots.device


def take_selections(slots, query_start_loc, seq_lens, prefilling, prefix_lens, usable, stored) -> None:
    rows, dev = _rows_and_device(slots)
    vector("query_start_loc", query_start_loc, rows + 1, (torch.int32,), dev)
    vector("seq_lens", seq_lens, rows, (torch.int32,), dev)
    vector("prefilling", prefilling, rows, (torch.bool,), dev)
    vector("prefix_lens", prefix_lens, None, (torch.int32,), dev)
    vector("usable", usable, rows, (torch.int32,), dev)
    vector("stored", stored, rows, (torch.int32,), dev)


def count_reads(slots, seq_lens, prefilling, usable, stored, kept, layers_of, heads, layers, dense_layers, out) -> None:
    rows, dev = _rows_and_device(slots)
    vector("seq_lens", seq_lens, rows, (torch.int32,), dev)
    vector("prefilling", prefilling, rows, (torch.bool,), dev)
    vector("usable", usable, rows, (torch.int32,), dev)
    vector("stored", stored, rows, (torch.int32,), dev)
    contracts.tensor("kept", kept, (None, rows, None), torch.int32, dev)
    contracts.group_size(heads, kept.shape[2], "kept")
    vector("layers_of", layers_of, kept.shape[0], (torch.int64,), dev)
    expect(0 <= dense_layers <= layers, "dense_layers", dense_layers, f"0 to {layers}")
    vector("out", out, len(READ_COUNTS), (torch.int64,), dev)


def count_sampled(num_sampled, verified, total) -> None:
    dev = total.device
    vector("num_sampled", num_sampled, None, INTEGERS, dev)
    if verified is not None:
        vector("verified", verified, num_sampled.shape[0], (torch.bool,), dev)
    vector("total", total, 1, (torch.int64,), dev)


def load_round(given: Round, held: Round, reqs: int, rows: int, query_len: int) -> None:
    expect(query_len >= 1, "query_len", query_len, "at least 1")
    expect(0 <= reqs <= rows, "reqs", reqs, f"0 to the {rows} rows")
    slots, dev = held.seeds.shape[0], held.seeds.device
    for i, (name, ours, theirs) in enumerate(zip(Round._fields, held, given, strict=True)):
        per_row = query_len if i < 2 else 1
        by_slot = i >= 6
        vector("held " + name, ours, slots if by_slot else rows * per_row, HELD[i], dev, longer=not by_slot)
        near = dev
        if name in ("temperature", "seeds") and getattr(theirs, "is_cuda", False) == ours.is_cuda:
            near = theirs.device  # a view of host memory: its device index has no meaning
        vector(name, theirs, slots if by_slot else reqs * per_row, GIVEN[i], near, longer=True)
