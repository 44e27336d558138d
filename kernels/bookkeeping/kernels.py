"""Small operations around a step: taking selections, counting, and loading the inputs of a round.

All tensors here are small, and the launches are the main cost. So each operation is a single kernel.

``take_selections`` finds the usable selection of each row, and clears the slots of prefilling rows. ``count_reads``
counts the reads of a step's verifying rows; a row verifies if it has a slot and does not prefill. ``count_sampled``
counts the tokens of verified rows. ``load_round`` copies the inputs of a round from ``given`` to ``held``, where a CUDA
graph of ``rows`` rows of ``query_len`` tokens reads them. Rows from ``reqs`` on get idx_mapping -1, and zeros in all
other tensors by row or token; 64-bit token ids and counts become 32-bit.
``start_clock`` and ``stop_clock`` measure what a stream runs between them by the GPU's global timer (PTX ISA, special
register %globaltimer). They can be captured in a CUDA graph, unlike events whose times the host reads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from ..contracts import checked
from . import contracts, reference
from .contracts import NO_SELECTION, Round

BLOCK = 256
# Most rows and (source, group) pairs that the counting program takes at once; 8 elements of a tile per thread. There is
# one program, because several would need zeroed sums, and zeroing is another launch. Not yet measured.
COUNT_ROWS = 64
COUNT_ENTRIES = 32


# Numbers of rows and tokens change from step to step. Specialised kernels, for 1 or for multiples of 16, would have to
# be compiled while requests wait.
@triton.jit(do_not_specialize=["rows"])
def _take_kernel(
    slots, query_start_loc, seq_lens, prefilling, prefix_lens, usable, stored, rows, BLOCK: tl.constexpr
):  # fmt: skip
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = r < rows
    slot = tl.load(slots + r, mask=inside, other=-1)
    ours = slot >= 0
    held = tl.load(prefix_lens + slot, mask=ours, other=-1)
    begin = tl.load(query_start_loc + r, mask=inside, other=0)
    end = tl.load(query_start_loc + r + 1, mask=inside, other=0)
    computed = tl.load(seq_lens + r, mask=inside, other=0) - (end - begin)
    clears = tl.load(prefilling + r, mask=inside, other=0) != 0
    tl.store(usable + r, tl.where((held == computed) & ~clears, held, -1), mask=inside)
    tl.store(stored + r, held, mask=inside)
    tl.store(prefix_lens + slot, tl.full([BLOCK], -1, tl.int32), mask=ours & clears)


@triton.jit(do_not_specialize=["rows"])
def _count_reads_kernel(
    slots, seq_lens, prefilling, usable, stored, kept, layers_of, out,
    rows, entries, groups, shared_by, layers, dense_layers, stride_ks, stride_kr, stride_kg,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr, NO_SELECTION_CODE: tl.constexpr,
):  # fmt: skip
    sparse = tl.zeros([ROWS], tl.int32)
    nothing = tl.zeros([ROWS], tl.int32)
    verifying = tl.zeros([ROWS], tl.int32)
    tokens = tl.zeros([ROWS], tl.int64)
    pruned = tl.zeros([ROWS], tl.int64)
    for start in range(0, rows, ROWS):
        r = start + tl.arange(0, ROWS)
        inside = r < rows
        slot = tl.load(slots + r, mask=inside, other=-1)
        counts = (slot >= 0) & (tl.load(prefilling + r, mask=inside, other=1) == 0)
        selected = tl.load(usable + r, mask=counts, other=-1) >= 0
        held = tl.load(stored + r, mask=counts, other=0)
        verifying += counts.to(tl.int32)
        sparse += selected.to(tl.int32)
        nothing += (held == NO_SELECTION_CODE).to(tl.int32)
        tokens += tl.load(seq_lens + r, mask=counts, other=0).to(tl.int64)
        for first in range(0, entries, ENTRIES):
            e = first + tl.arange(0, ENTRIES)
            source = e // groups
            weight = tl.load(layers_of + source, mask=e < entries, other=0)
            places = source * stride_ks + (e % groups) * stride_kg
            places = places.to(tl.int64)[None, :] + r.to(tl.int64)[:, None] * stride_kr
            read = tl.load(kept + places, mask=counts[:, None] & (e < entries)[None, :], other=0)
            pruned += tl.sum(read.to(tl.int64) * weight[None, :], 1)
    rows_sparse = tl.sum(sparse, 0)
    rows_empty = tl.sum(nothing, 0)
    rows_stale = tl.sum(verifying, 0) - rows_sparse - rows_empty
    everything = tl.sum(tokens, 0) * (shared_by * groups)
    tl.store(out, rows_sparse.to(tl.int64))
    tl.store(out + 1, rows_empty.to(tl.int64))
    tl.store(out + 2, rows_stale.to(tl.int64))
    tl.store(out + 3, tl.sum(pruned, 0) * shared_by + everything * dense_layers)
    tl.store(out + 4, everything * layers)


@triton.jit(do_not_specialize=["rows"])
def _count_sampled_kernel(num_sampled, verified, total, rows, BLOCK: tl.constexpr):
    tokens = tl.zeros([BLOCK], tl.int64)
    for start in range(0, rows, BLOCK):
        r = start + tl.arange(0, BLOCK)
        counts = r < rows
        if verified is not None:
            counts &= tl.load(verified + r, mask=counts, other=0) != 0
        tokens += tl.load(num_sampled + r, mask=counts, other=0).to(tl.int64)
    tl.store(total, tl.load(total) + tl.sum(tokens, 0))


@triton.jit(do_not_specialize=["reqs", "rows"])
def _load_round_kernel(
    input_ids, positions, seq_lens, idx_mapping, num_sampled, num_rejected, last_sampled, temperature, seeds,
    to_input_ids, to_positions, to_seq_lens, to_idx_mapping, to_num_sampled, to_num_rejected, to_last_sampled,
    to_temperature, to_seeds,
    reqs, rows, query_len, slots, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    given, wanted = i < reqs * query_len, i < rows * query_len
    tl.store(to_input_ids + i, tl.load(input_ids + i, mask=given, other=0), mask=wanted)
    tl.store(to_positions + i, tl.load(positions + i, mask=given, other=0), mask=wanted)
    given, wanted = i < reqs, i < rows
    tl.store(to_seq_lens + i, tl.load(seq_lens + i, mask=given, other=0), mask=wanted)
    tl.store(to_idx_mapping + i, tl.load(idx_mapping + i, mask=given, other=-1), mask=wanted)
    tl.store(to_num_sampled + i, tl.load(num_sampled + i, mask=given, other=0).to(tl.int32), mask=wanted)
    tl.store(to_num_rejected + i, tl.load(num_rejected + i, mask=given, other=0).to(tl.int32), mask=wanted)
    wanted = i < slots
    tl.store(to_last_sampled + i, tl.load(last_sampled + i, mask=wanted, other=0).to(tl.int32), mask=wanted)
    tl.store(to_temperature + i, tl.load(temperature + i, mask=wanted, other=0), mask=wanted)
    tl.store(to_seeds + i, tl.load(seeds + i, mask=wanted, other=0), mask=wanted)


@triton.jit
def _start_kernel(began):
    tl.store(began, globaltimer())


@triton.jit(do_not_specialize=["times"])
def _stop_kernel(began, times, total):
    passed = globaltimer() - tl.load(began)
    tl.store(total, tl.load(total) + passed * times)


COMPILED = isinstance(_start_kernel, triton.JITFunction)  # Triton's interpreter has no clock


@checked(contracts.take_selections)
def take_selections(slots, query_start_loc, seq_lens, prefilling, prefix_lens, usable, stored) -> None:
    rows = slots.shape[0]
    if rows == 0:
        return
    _take_kernel[(triton.cdiv(rows, BLOCK),)](
        slots, query_start_loc, seq_lens, prefilling, prefix_lens, usable, stored, rows, BLOCK=BLOCK
    )  # fmt: skip


@checked(contracts.count_reads)
def count_reads(slots, seq_lens, prefilling, usable, stored, kept, layers_of, heads, layers, dense_layers, out) -> None:
    sources, rows, groups = kept.shape
    entries = sources * groups
    _count_reads_kernel[(1,)](
        slots, seq_lens, prefilling, usable, stored, kept, layers_of, out,
        rows, entries, groups, heads // groups, layers, dense_layers, *kept.stride(),
        ROWS=COUNT_ROWS, ENTRIES=min(triton.next_power_of_2(max(entries, 1)), COUNT_ENTRIES),
        NO_SELECTION_CODE=NO_SELECTION, num_warps=8,
    )  # fmt: skip


@checked(contracts.count_sampled)
def count_sampled(num_sampled, verified, total) -> None:
    _count_sampled_kernel[(1,)](num_sampled, verified, total, num_sampled.shape[0], BLOCK=BLOCK)


@checked(contracts.load_round)
def load_round(given: Round, held: Round, reqs: int, rows: int, query_len: int) -> None:
    slots = held.seeds.shape[0]
    _load_round_kernel[(triton.cdiv(max(rows * query_len, slots, 1), BLOCK),)](
        *given, *held, reqs, rows, query_len, slots, BLOCK=BLOCK
    )


@checked(contracts.start_clock)
def start_clock(began) -> None:
    if not COMPILED:
        return reference.start_clock(began)
    _start_kernel[(1,)](began, num_warps=1)


@checked(contracts.stop_clock)
def stop_clock(began, times, total) -> None:
    if not COMPILED:
        return reference.stop_clock(began, times, total)
    _stop_kernel[(1,)](began, times, total, num_warps=1)
