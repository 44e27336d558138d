"""The tensors of a round, and the contracts of the operations in ``kernels.py``."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..contracts import Contract, Table, contract, expect, group_size

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


take_selections = Contract(
    """
    slots            [R]      int64  row of the store; -1 = padded row: usable and stored = -1, nothing is cleared.
        Except for -1, no two rows have the same slot
    query_start_loc  [R + 1]  int32
    seq_lens         [R]      int32  seq_lens minus the query length is the number of tokens before this step
    prefilling       [R]      bool
    prefix_lens      [any]    int32  [slots + 1]: context length of each selection, or NO_SELECTION. Updated in place:
        -1 for prefilling rows. The last slot belongs to no request
    usable           [R]      int32  written: the slot's length, if it equals the row's number of tokens before this
        step and the row does not prefill; else -1
    stored           [R]      int32  written: the slot's length before this call
    """
)


@contract(
    """
    slots               [R]        int64  these five as in ``take_selections``
    prefilling          [R]        bool
    seq_lens, usable, stored  [R]        int32
    kept                [S, R, G]  int32  tokens that each head of group g reads with source s
    layers_of           [S]        int64  number of layers that read source s
    heads, layers, dense_layers                    number of KV heads (a multiple of G), of all layers, of dense layers
    out                 [5]        int64  written: rows that read a selection, rows without one (stored is
        NO_SELECTION), rows whose selection was made for another length, (token, KV head, layer) entries read, and such
        entries present
    """
)
def count_reads(kept, heads, layers, dense_layers) -> None:
    group_size(heads, kept.shape[2], "kept")
    expect(0 <= dense_layers <= layers, "dense_layers", dense_layers, f"0 to {layers}")


count_sampled = Contract(
    """
    num_sampled  [R]  integers
    verified     [R]  bool or None  None: all rows
    total        [1]  int64         += sum of num_sampled over verified rows
    """
)


start_clock = Contract(
    """
    began  [1]  int64  written: the device's clock, in nanoseconds
    """
)


@contract(
    """
    began  [1]  int64  of ``start_clock``
    times                how often what was measured takes place
    total  [1]  int64  += times * (the device's clock - began)
    """
)
def stop_clock(times) -> None:
    expect(times >= 1, "times", times, "at least 1")


# Sizes are the numbers of tokens, rows and request slots. Tensors may be longer; elements after these stay untouched.
GIVEN = Table(
    """
    input_ids           [>= tokens]  int32
    positions           [>= tokens]  int64
    seq_lens            [>= rows]    int32
    idx_mapping         [>= rows]    int64
    num_sampled, num_rejected  [>= rows]    integers
    last_sampled        [>= slots]   integers
    temperature         [>= slots]   float32   may be a view of the host's memory
    seeds               [>= slots]   int64     may be a view of the host's memory
    """,
    views=("temperature", "seeds"),
)
HELD = Table(
    """
    input_ids           [>= tokens]  int32
    positions           [>= tokens]  int64
    seq_lens, num_sampled, num_rejected  [>= rows]    int32
    idx_mapping         [>= rows]    int64
    last_sampled        [slots]      int32
    temperature         [slots]      float32
    seeds               [slots]      int64
    """
)


def load_round(given: Round, held: Round, reqs: int, rows: int, query_len: int) -> None:
    """``held`` is what a captured round of ``rows`` rows of ``query_len`` tokens reads; ``reqs`` rows are given."""
    expect(query_len >= 1, "query_len", query_len, "at least 1")
    expect(0 <= reqs <= rows, "reqs", reqs, f"0 to the {rows} rows")
    slots, device = held.seeds.shape[0], held.seeds.device
    HELD.check(held._asdict(), device, tokens=rows * query_len, rows=rows, slots=slots)
    GIVEN.check(given._asdict(), device, tokens=reqs * query_len, rows=reqs, slots=slots)
