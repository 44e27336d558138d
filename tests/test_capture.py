"""The capture: the draft's attention, averaged over heads and combined over steps, becomes the selection."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch

from specattn_vllm import executors
from specattn_vllm.kernels.reference import unpack_bits
from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.selection.capture import DraftCapture

CPU = torch.device("cpu")
HEADS, KV_HEADS, SIZE, BLOCK = 4, 2, 64, 16
MAX_LEN, MAX_REQS, STEPS = 70, 5, 3  # 70 fills no whole number of words
SCALE = 0.4  # sharper than 1 / sqrt(64), so that top-p has something to choose
LAYERS = {"draft.layers.0": 0, "draft.layers.2": 1}
COMBINE = pytest.mark.parametrize("combine", ["sum", "max", "first", "union"])


def options(combine: str = "sum", **changes) -> SpecAttnOptions:
    base = {"top_p": 0.7, "min_tokens": 0, "sink_tokens": 1, "recent_tokens": 2}
    return SpecAttnOptions(combine=combine, **(base | changes))


@functools.cache
def batch(*lens: int, seed: int = 0) -> Draft:
    """A draft that tests share, because the oracle takes most of their time; none of them changes it."""
    return Draft([*lens], seed)


def make(opts: SpecAttnOptions) -> DraftCapture:
    return DraftCapture(
        opts,
        executors.resolve("torch", CPU),
        layer_sources=LAYERS,
        num_heads=HEADS,
        num_steps=STEPS,
        max_num_reqs=MAX_REQS,
        max_model_len=MAX_LEN,
        device=CPU,
    )


class Draft:
    """A draft model's cache and queries for one round: request r has lens[r] keys at step 0, one more each step."""

    def __init__(self, lens: list[int], seed: int = 0) -> None:
        self.lens, self.generator = lens, torch.Generator().manual_seed(seed)
        self.masses: dict[tuple[str, int], list[list[float]]] = {}
        width = -(-(MAX_LEN + STEPS) // BLOCK)
        blocks = torch.randperm(len(lens) * width, generator=self.generator)
        self.block_table = blocks.view(len(lens), width).int()
        # Token-major, as vLLM prefers.
        self.caches = {
            name: self.randn(len(blocks), BLOCK, KV_HEADS, 2 * SIZE).transpose(1, 2) for name in ("other", *LAYERS)
        }
        # The query tokens of step 0: each request's stretch has tokens before the sampled one, and rejected ones after.
        before, after = [r % 3 for r in range(len(lens))], [(r + 1) % 2 for r in range(len(lens))]
        stretch = [b + 1 + a for b, a in zip(before, after, strict=True)]
        starts = [0, *itertools.accumulate(stretch)]
        self.query_rows = torch.tensor([starts[r] + before[r] for r in range(len(lens))])
        self.queries = {
            (name, k): self.randn(starts[-1] if k == 0 else len(lens), HEADS, SIZE)
            for name in self.caches
            for k in range(STEPS)
        }

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def rows(self, k: int) -> torch.Tensor | None:
        return self.query_rows if k == 0 else None

    def run(self, capture: DraftCapture, wanted: list[bool], after_layer=None) -> list[dict]:
        """One round; returns per step {layer: (whether attention was done, its output)}."""
        capture.begin_round(len(self.lens), torch.tensor(wanted))
        steps = []
        for k in range(STEPS):
            capture.begin_step(k, self.rows(k), torch.tensor(self.lens, dtype=torch.int32) + k)
            results = {}
            for name, cache in self.caches.items():
                query = self.queries[name, k]
                out = torch.full_like(query, torch.nan)
                done = capture.attend(name, query, cache, self.block_table, SCALE, out)
                results[name] = (done, out)
                if after_layer is not None and name in LAYERS:
                    after_layer(k, LAYERS[name])
            capture.end_step()
            steps.append(results)
        return steps

    # The oracle, in float64 and a loop over everything.

    def attention(self, name: str, k: int, r: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Softmax attention [HEADS, keys] of the sampled row of request r at step k, and its output [HEADS, SIZE]."""
        query = self.queries[name, k][int(self.query_rows[r]) if k == 0 else r].double()
        p = torch.arange(self.lens[r] + k)
        kv = self.caches[name][self.block_table[r, p // BLOCK], :, p % BLOCK].double().transpose(0, 1)
        weights, outputs = [], []
        for h in range(HEADS):
            key, value = kv[h // (HEADS // KV_HEADS)].split(SIZE, dim=-1)
            weights.append((SCALE * key @ query[h]).softmax(0))
            outputs.append(weights[-1] @ value)
        return torch.stack(weights), torch.stack(outputs)

    def step_mass(self, name: str, r: int) -> list[list[float]]:
        """The mass of each step on the committed context of request r, averaged over query heads."""
        if (name, r) not in self.masses:
            context = self.lens[r] - 1
            self.masses[name, r] = [self.attention(name, k, r)[0].mean(0)[:context].tolist() for k in range(STEPS)]
        return self.masses[name, r]

    def selection(self, opts: SpecAttnOptions, name: str, r: int) -> set[int]:
        steps = self.step_mass(name, r)
        if opts.combine == "union":
            return set().union(*(top_p(mass, opts) for mass in steps))
        return top_p(combined(steps, opts.combine), opts)


def combined(steps: list[list[float]], combine: str) -> list[float]:
    """One mass per token, in the units of a single step."""
    if combine == "sum":
        return [sum(masses) / len(steps) for masses in zip(*steps, strict=True)]
    if combine == "max":
        return [max(masses) / len(steps) for masses in zip(*steps, strict=True)]
    return steps[0]


def top_p(mass: list[float], opts: SpecAttnOptions) -> set[int]:
    """The forced tokens, then by mass until the share is reached, between floor and cap."""
    n = len(mass)
    forced = {p for p in range(n) if p < opts.sink_tokens or p >= n - opts.recent_tokens}
    order = sorted(forced) + sorted(set(range(n)) - forced, key=lambda p: (-mass[p], -p))
    count, total = len(forced), sum(mass)
    while count < n and sum(mass[p] for p in order[:count]) < opts.top_p * total:
        count += 1
    cap = min(n, math.ceil(n * opts.max_fraction), n if opts.max_tokens is None else opts.max_tokens)
    cap = max(cap, len(forced))
    return set(order[: max(min(count, cap), min(opts.min_tokens, cap))])


def tokens(bits: torch.Tensor) -> set[int]:
    return set(unpack_bits(bits, 32 * bits.shape[-1]).nonzero().flatten().tolist())


@COMBINE
@pytest.mark.parametrize(
    "changes",
    [{}, {"max_tokens": 9}, {"min_tokens": 40}, {"max_fraction": 0.25}, {"top_p": 1.0}, {"sink_tokens": 80}],
    ids=str,
)
def test_the_selection_is_that_of_the_draft_s_attention(combine, changes):
    draft, opts = batch(60, 33, MAX_LEN - STEPS, 17), options(combine, **changes)
    capture = make(opts)
    draft.run(capture, [True] * 4)
    bits, prefix_lens = capture.select()
    assert bits.shape == (2, 4, 1, 3)
    # The sampled token is the first that verification recomputes; the context is what comes before.
    assert prefix_lens.tolist() == [length - 1 for length in draft.lens]
    assert prefix_lens.dtype == torch.int32
    for (name, s), r in itertools.product(LAYERS.items(), range(4)):
        assert tokens(bits[s, r, 0]) == draft.selection(opts, name, r), (name, r)


def test_the_rules_differ_on_this_data():
    # Otherwise the test above could not tell them apart.
    draft = batch(60, 33, MAX_LEN - STEPS, 17)
    chosen = [
        tuple(frozenset(draft.selection(options(combine), name, r)) for name in LAYERS for r in range(4))
        for combine in ("sum", "max", "first", "union")
    ]
    assert len(set(chosen)) == 4
    assert all(0 < len(each) < draft.lens[i % 4] - 1 for rule in chosen for i, each in enumerate(rule))


@pytest.mark.parametrize("combine", ["sum", "max", "first"])
def test_the_mass_is_the_mean_over_heads_combined_over_steps(combine):
    draft, capture = batch(60, 33), make(options(combine))
    draft.run(capture, [True, True])
    for (name, s), r in itertools.product(LAYERS.items(), range(2)):
        wanted = torch.tensor(combined(draft.step_mass(name, r), combine))
        torch.testing.assert_close(capture.mass[s, r, 0, : draft.lens[r] - 1], wanted, rtol=1e-4, atol=1e-7)


@COMBINE
def test_mass_never_sums_to_more_than_one(combine):
    """The selection computes in fixed point, which overflows at 2; a step's mass is 1 at most, and so is a round's."""
    draft, capture = batch(60, 33, 2), make(options(combine))
    sums = []

    def watch(k, source):
        sums.extend(capture.mass[source, r, 0, : n - 1].sum().item() for r, n in enumerate(draft.lens))

    draft.run(capture, [True] * 3, after_layer=watch)
    assert len(sums) == STEPS * len(LAYERS) * 3
    assert max(sums) <= 1 + 1e-5
    assert max(sums) > 0.2


@COMBINE
def test_rows_that_are_not_wanted_get_nothing_and_change_nothing(combine):
    draft, opts = batch(60, 33, 20, 17), options(combine)
    capture = make(opts)
    draft.run(capture, [True, False, True, False])
    bits, prefix_lens = capture.select()
    assert prefix_lens.tolist() == [59, 0, 19, 0]
    for (name, s), r in itertools.product(LAYERS.items(), range(4)):
        wanted = draft.selection(opts, name, r) if r in (0, 2) else set()
        assert tokens(bits[s, r, 0]) == wanted


@COMBINE
def test_a_round_without_wanted_rows_selects_nothing(combine):
    draft, capture = batch(60, 33), make(options(combine))
    capture._bits.fill_(-1)
    draft.run(capture, [False, False])
    bits, prefix_lens = capture.select()
    assert prefix_lens.tolist() == [0, 0]
    assert not bits.any()


@COMBINE
def test_a_first_token_has_no_context_to_select_from(combine):
    draft, capture = batch(1, 2), make(options(combine))
    draft.run(capture, [True, True])
    bits, prefix_lens = capture.select()
    assert prefix_lens.tolist() == [0, 1]
    assert [tokens(bits[0, r, 0]) for r in range(2)] == [set(), {0}]


@COMBINE
def test_rounds_of_different_sizes_do_not_see_each_other(combine):
    opts = options(combine)
    capture = make(opts)
    for seed, lens in enumerate(([60, 33, 20, 17, 50], [9], [66, 40], [5, 6, 7, 8, 9])):
        # Bits nobody set, masses above everything: what an earlier round left must not matter.
        capture._bits.fill_(-1)
        capture._mass.fill_(1e9)
        capture.scores.fill_(1e9)
        draft = batch(*lens, seed=seed)
        draft.run(capture, [True] * len(lens))
        bits, prefix_lens = capture.select()
        assert prefix_lens.tolist() == [length - 1 for length in lens]
        for (name, s), r in itertools.product(LAYERS.items(), range(len(lens))):
            assert tokens(bits[s, r, 0]) == draft.selection(opts, name, r)


def test_at_step_0_the_sampled_rows_are_picked_out_of_the_batch():
    draft, opts = Draft([60, 33, 20]), options("first")
    assert draft.query_rows.tolist() == [0, 3, 6]  # of 2 + 2 + 4 tokens: first, last and inside of its stretch
    picked, first_rows = make(opts), make(opts)
    draft.run(picked, [True] * 3)
    draft.query_rows = torch.tensor([0, 1, 2])
    draft.run(first_rows, [True] * 3)
    assert not torch.equal(picked.select()[0], first_rows.select()[0])


def test_attention_is_taken_over_where_every_row_is_a_sampled_one():
    draft, capture = batch(60, 33, 20), make(options("sum"))
    steps = draft.run(capture, [True, False, True])
    for name in LAYERS:
        done, out = steps[0][name]
        # Step 0 has other tokens too, and those need attention as well.
        assert not done
        assert out.isnan().all()
        for k in (1, 2):
            done, out = steps[k][name]
            assert done
            for r in (0, 2):
                wanted = draft.attention(name, k, r)[1].float()
                torch.testing.assert_close(out[r], wanted, rtol=1e-4, atol=1e-5)
            assert (out[1] == 0).all()


def test_other_layers_are_left_alone():
    for results in batch(60).run(make(options()), [True]):
        done, out = results["other"]
        assert not done
        assert out.isnan().all()


def test_the_first_rule_leaves_later_steps_to_the_backend():
    draft = batch(60, 33)
    steps = draft.run(make(options("first")), [True, True])
    assert not any(done for results in steps for done, _ in results.values())


def test_nothing_is_captured_outside_a_step():
    draft, capture = batch(60), make(options())
    draft.run(capture, [True])
    before = capture.mass.clone()
    query = draft.queries["draft.layers.0", 1]
    out = torch.full_like(query, torch.nan)
    cache = draft.caches["draft.layers.0"]
    assert not capture.attend("draft.layers.0", query, cache, draft.block_table, SCALE, out)
    assert out.isnan().all()
    n = draft.lens[0] - 1
    assert torch.equal(capture.mass[..., :n], before[..., :n])


def test_its_size_is_that_of_its_buffers():
    rows = len(LAYERS) * MAX_REQS
    assert make(options()).nbytes == 4 * (MAX_REQS * HEADS * (MAX_LEN + 1) + rows * (MAX_LEN + 3 + 1))


@pytest.mark.parametrize("combine", ["sum", "max", "union", "first"])
def test_a_round_without_a_draft_step_selects_nothing(combine):
    """Also after a round that did, of another size: nothing of it may be stored again."""
    capture = make(SpecAttnOptions(combine=combine))
    for rows in (3, 1, 2):
        capture.begin_round(rows, torch.ones(rows, dtype=torch.bool))
        capture._bits.fill_(-1)
        bits, prefix_lens = capture.select()
        assert bits.shape[1] == rows
        assert not bits.any()
        assert prefix_lens.tolist() == [0] * rows
