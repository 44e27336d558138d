"""Audits: which pairs are measured, that what is measured is the mass of the selection, and what the totals say."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from specattn_vllm import executors
from specattn_vllm.selection.audit import Audit
from specattn_vllm.selection.audit_report import BINS, lower_edge
from specattn_vllm.stats import Counters, Counts

CPU = torch.device("cpu")
LAYERS, REQUESTS, HEADS, GROUP, SIZE, BLOCK = ["layers.1", "layers.3", "layers.4"], 6, 2, 2, 8, 4
QUERY_HEADS = HEADS * GROUP
OPERATIONS = executors.resolve("torch", CPU)


def audit(share: float = 1.0, requests: int = REQUESTS) -> Audit:
    return Audit(
        OPERATIONS,
        Counters(CPU),
        layers=LAYERS,
        num_heads=QUERY_HEADS,
        num_kv_heads=HEADS,
        max_num_reqs=requests,
        share=share,
        device=CPU,
    )


def choose(audit: Audit, rows: list[tuple[int, int]], lens=None, starts=None) -> None:
    """Choose from rows of (slot, usable length), by default of 3 tokens each."""
    slots, usable = zip(*rows, strict=True)
    lens = [10 + r for r in range(len(rows))] if lens is None else lens
    starts = torch.arange(len(rows), dtype=torch.int32) * 3 if starts is None else starts
    audit.choose(
        torch.tensor(slots),
        torch.tensor(usable, dtype=torch.int32),
        starts,
        torch.tensor(lens, dtype=torch.int32),
    )


# Which pairs


def test_all_pairs_of_rows_that_read_a_selection_are_audited_and_no_others():
    made = audit()
    made.scored_rows.fill_(77)  # of a step with more rows
    made.requests.fill_(77)
    choose(made, [(2, 7), (0, -1), (5, 9), (-1, -1)])
    assert made.scored_rows[..., 0].tolist() == [[0, -1, 6, -1, -1, -1]] * len(LAYERS)
    assert made.requests.sort(1).values.tolist() == [[-1, -1, -1, -1, 0, 2]] * len(LAYERS)


@pytest.mark.parametrize("rows, share", [(1, 0.05), (6, 0.25), (16, 0.0625), (20, 0.05), (9, 1.0)])
def test_a_layer_audits_its_share_of_the_rows_and_hardly_more(rows, share):
    """What the launch is sized for holds in every step, also where half of the rows read everything."""
    made, steps, counts = audit(share, requests=rows), 150, {True: [], False: []}
    assert made.at_most(rows) == made.requests.shape[1] == math.ceil(share * rows)
    for step in range(steps):
        half = step % 2 == 0
        usable = [-1 if half and slot % 2 else 5 for slot in range(rows)]
        choose(made, [*enumerate(usable)], lens=[700 + 3 * step + slot for slot in range(rows)])
        scored = made.scored_rows[..., 0]
        assert [sorted(r for r in listed if r >= 0) for listed in made.requests.tolist()] == [
            row.nonzero()[:, 0].tolist() for row in scored >= 0
        ]
        listed = made.requests >= 0
        assert torch.equal(listed, listed.sort(1, descending=True).values)  # none behind a gap
        counts[half].extend(listed.sum(1).tolist())
    for half, found in counts.items():
        mean = share * (-(-rows // 2) if half else rows)
        assert {*found} <= {math.floor(mean), math.ceil(mean)}
        rest = mean % 1
        assert abs(sum(found) / len(found) - mean) <= 4 * math.sqrt(rest * (1 - rest) / len(found))


def test_a_share_of_the_pairs_is_chosen_and_other_ones_in_each_step():
    made, steps, share = audit(0.25, requests=64), 60, 0.25
    chosen = []
    for step in range(steps):
        choose(made, [(slot, 5) for slot in range(64)], lens=[500 + 4 * step + slot % 3 for slot in range(64)])
        chosen.append(made.scored_rows[..., 0] >= 0)
    chosen = torch.stack(chosen)  # [steps, layers, slots]
    pairs = chosen.numel()
    # Four standard deviations of so many draws, and as near for each layer and each slot by itself.
    assert abs(chosen.float().mean() - share) < 4 * math.sqrt(share * (1 - share) / pairs)
    for by in (chosen.float().mean((0, 2)), chosen.float().mean((0, 1)), chosen.float().mean((1, 2))):
        assert ((by - share).abs() < 5 * math.sqrt(share * (1 - share) * by.shape[0] / pairs)).all()
    # One choice says nothing of another: both are made in a sixteenth of the cases.
    together = pairs / 2
    for a, b in ((chosen[:-1], chosen[1:]), (chosen[:, :-1], chosen[:, 1:]), (chosen[..., :-1], chosen[..., 1:])):
        assert abs((a & b).float().mean() - share**2) < 5 * math.sqrt(share**2 / together)


def test_the_same_step_is_audited_alike():
    """Under tensor parallelism each rank chooses for itself."""
    first, second = audit(0.5), audit(0.5)
    for made in (first, second):
        choose(made, [(slot, 5) for slot in range(REQUESTS)])
    assert torch.equal(first.scored_rows, second.scored_rows)
    assert len({*first.scored_rows.flatten().tolist()}) > 2


# What is measured


class Step:
    """Two requests of 3 tokens each that read a selection, a dense one between them, and a row that fills the batch."""

    lens, q_lens, rows = [21, 14, 30, 0], [3, 2, 3, 0], [(1, 18), (4, -1), (3, 27), (-1, -1)]

    def __init__(self, seed: int = 0, temperature: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.cache = torch.randn(24, HEADS, BLOCK, 2 * SIZE, generator=generator)
        self.query = torch.randn(len(LAYERS), 8, QUERY_HEADS, SIZE, generator=generator) * temperature
        self.starts = torch.tensor([0, 3, 5, 8, 8], dtype=torch.int32)
        blocks = torch.arange(24, dtype=torch.int32).view(3, 8)
        table = torch.cat((blocks, torch.full((1, 8), 99_999, dtype=torch.int32)))
        self.md = SimpleNamespace(
            block_table=table,
            seq_lens=torch.tensor(self.lens, dtype=torch.int32),
            query_start_loc=self.starts,
        )
        # The new tokens, and of the context every third.
        self.kept = [
            [p for p in range(n) if p >= n - q or usable < 0 or p % 3 == 0]
            for n, q, (_, usable) in zip(self.lens, self.q_lens, self.rows, strict=True)
        ]

    def run(self, made: Audit) -> None:
        choose(made, self.rows, self.lens, self.starts[:-1])
        width = max(map(len, self.kept))
        pages = torch.zeros(4, HEADS, width, dtype=torch.int32)
        for r, kept in enumerate(self.kept):
            for h in range(HEADS):
                for j, p in enumerate(kept):
                    block = int(self.md.block_table[r, p // BLOCK])
                    pages[r, h, j] = (block * HEADS + h) * BLOCK + p % BLOCK
        counts = torch.tensor([[len(kept)] * HEADS for kept in self.kept], dtype=torch.int32)
        for i, name in enumerate(LAYERS):
            layer = made.of_layer(name)
            layer.note_values(self.cache[..., SIZE:].transpose(1, 2).flatten(0, 1), torch.arange(24 * BLOCK))
            lse = torch.full((8, QUERY_HEADS), torch.nan)
            out = torch.empty_like(self.query[i])
            OPERATIONS.sparse_attention(self.query[i], self.cache, pages, counts, self.starts, 0.5, out, 3, lse)
            layer.observe(self.query[i], self.cache, self.md, 4, 0.5, lse)

    def plainly(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(s, the error) of each layer, audited request and query head, from softmax over everything."""
        mass, error = [], []
        for i in range(len(LAYERS)):
            for r in (0, 2):
                seen = self.lens[r] - (self.q_lens[r] - 1)
                kept = [p for p in self.kept[r] if p < seen]
                for hq in range(QUERY_HEADS):
                    kv = self.cache[self.md.block_table[r].long(), hq // GROUP].flatten(0, 1)[:seen]
                    logits = 0.5 * kv[:, :SIZE] @ self.query[i, int(self.starts[r]), hq]
                    weights = logits.softmax(0)
                    full = weights @ kv[:, SIZE:]
                    mass.append(weights[kept].sum())
                    selected = logits[kept].softmax(0) @ kv[kept, SIZE:]
                    error.append((full - selected).norm())
        return torch.stack(mass).view(len(LAYERS), -1), torch.stack(error).view(len(LAYERS), -1)


def test_the_retained_mass_is_the_softmax_weight_of_what_was_read():
    made, step = audit(), Step()
    # What no audit writes is not read either.
    made.lse_selected.fill_(torch.nan)
    made.lse_full.fill_(torch.inf)
    step.run(made)
    made.fold()
    mass, _ = step.plainly()
    samples = mass.shape[1]
    assert samples == 2 * QUERY_HEADS and 0.1 < mass.min() < mass.max() < 0.9
    totals = made.read()
    assert totals.pairs.tolist() == [2] * len(LAYERS)
    torch.testing.assert_close(totals.retained, mass.sum(1).double(), rtol=1e-5, atol=0)
    assert totals.histogram.sum(1).tolist() == [samples] * len(LAYERS)
    edges = torch.tensor([lower_edge(b) for b in range(BINS + 1)])
    for layer, found in zip(mass, totals.histogram, strict=True):
        assert torch.equal(found, torch.histogram(layer, edges).hist.long())
    assert made.counters.read() == Counts(audited_pairs=2 * len(LAYERS))


@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
def test_the_bound_holds(temperature):
    made, step = audit(), Step(seed=3, temperature=temperature)
    step.run(made)
    made.fold()
    mass, error = step.plainly()
    norms = step.cache[..., SIZE:].norm(dim=-1).amax((0, 2)).repeat_interleave(GROUP).repeat(2)
    bound = 2 * (1 - mass) * norms
    assert (error <= bound).all() and (error > 0).any()
    totals = made.read()
    torch.testing.assert_close(totals.bound, bound.sum(1).double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(totals.largest_bound, bound.amax(1), rtol=1e-4, atol=1e-5)


def test_a_selection_of_everything_retains_everything():
    made, step = audit(), Step()
    step.kept = [[*range(n)] for n in step.lens]
    step.run(made)
    made.fold()
    totals = made.read()
    assert totals.histogram[:, -1].tolist() == [2 * QUERY_HEADS] * len(LAYERS)
    assert (totals.bound < 1e-4).all()


def test_steps_add_up_and_each_counts_once():
    made, step = audit(), Step()
    step.run(made)
    made.fold()
    once = made.read()
    made.fold()
    assert torch.equal(made.read().histogram, once.histogram)
    step.run(made)
    made.discard()  # a step that was run to warm up
    made.fold()
    assert torch.equal(made.read().pairs, once.pairs)
    step.run(made)
    made.fold()
    assert torch.equal(made.read().histogram, 2 * once.histogram)
    assert torch.equal(made.read().largest_bound, once.largest_bound)
    made.reset()
    assert made.read().pairs.sum() == made.read().histogram.sum() == made.largest_values.sum() == 0


def test_the_largest_value_is_that_of_what_was_written():
    layer = (made := audit()).of_layer(LAYERS[1])
    value = torch.zeros(5, HEADS, SIZE)
    value[0, 0, 2], value[1, 1, :2], value[2], value[4] = -3.0, torch.tensor([3.0, 4.0]), 100.0, 200.0
    layer.note_values(value, torch.tensor([7, 0, -1, 3]))  # the third goes nowhere, the fifth is padding
    assert made.largest_values.tolist() == [[0, 0], [3, 5], [0, 0]]
    layer.note_values(value[:1] * 2, torch.tensor([9]))
    layer.note_values(value, torch.empty(0, dtype=torch.int64))
    assert made.largest_values.tolist() == [[0, 0], [6, 5], [0, 0]]


def test_pairs_that_are_not_audited_are_in_no_total():
    """Their measurements are those of a step before, or nobody's."""
    made, step = audit(), Step()
    step.run(made)
    made.fold()
    before = made.read()
    for undefined in (made.lse_selected, made.lse_full):
        undefined.copy_(torch.randn(undefined.shape) - 3 * (undefined is made.lse_selected))
    choose(made, [(slot, -1) for slot in range(REQUESTS)])
    made.fold()
    told = before.histogram, before.pairs, before.retained, before.bound, before.largest_bound
    assert all(torch.equal(total, found) for total, found in zip(told, made.totals(), strict=True))


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_request_that_is_no_number_has_lost_everything_and_spoils_no_total(number):
    usual, changed = (audit(), Step(seed=3)), (audit(), Step(seed=3))
    changed[1].cache[:6] = number  # blocks of the first request
    for made, step in (usual, changed):
        step.run(made)
        made.fold()
    mass, _ = usual[1].plainly()
    totals = changed[0].read()
    assert totals.pairs.tolist() == [2] * len(LAYERS)
    torch.testing.assert_close(totals.retained, mass[:, QUERY_HEADS:].sum(1).double(), rtol=1e-5, atol=0)
    assert (totals.histogram[:, 0] >= QUERY_HEADS).all()
    assert totals.bound.isfinite().all() and totals.largest_bound.isfinite().all()
    changed[1].cache[:6] = usual[1].cache[:6]
    before = totals.retained
    changed[1].run(changed[0])
    changed[0].fold()
    torch.testing.assert_close(changed[0].read().retained - before, usual[0].read().retained, rtol=1e-5, atol=0)


def test_each_line_is_about_what_came_since_the_last():
    made, step = audit(), Step()

    def line() -> str | None:
        return made.line([total.clone() for total in made.totals()])

    assert line() is None
    for _ in range(2):
        step.run(made)
        made.fold()
        assert line().startswith(f"specattn: audit of {2 * len(LAYERS)} pairs")
        assert line() is None
