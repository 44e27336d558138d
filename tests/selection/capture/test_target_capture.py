"""A target's verification: what its two scored rows attended to, and the selection made of it, against float64."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

from specattn_vllm.backend.metadata import SpecAttnMetadata
from specattn_vllm.selection.target_capture import TargetCapture

CPU = torch.device("cpu")
HEADS, KV_HEADS, SIZE, BLOCK = 4, 2, 64, 16
MAX_LEN, MAX_REQS, LONGEST = 70, 8, 4  # 70 fills no whole number of words; verifications have K + 1 = 4 tokens
SCALE = 0.4  # sharper than 1 / sqrt(64), so that there is something to choose
LAYERS = {"model.layers.0": 0, "model.layers.2": 1}
OTHER = "model.layers.1"
STALE = 1_000_000  # following it is an index error

# (tokens computed before, tokens of the step). What vLLM calls decodes comes first, then prompts by length.
VERIFICATIONS = [(40, 4), (17, 1), (33, 3), (66, 4), (0, 1)]
SHORT_PROMPT = [(0, 3), (12, 2)]
PROMPTS = [(21, 9), (0, 20)]
MIXED = VERIFICATIONS[:3] + SHORT_PROMPT + PROMPTS
EMPTY, PADDED = (0, 0), (-LONGEST, LONGEST)  # rows of a graph that no request has: without tokens, or with some


class Step:
    """A step's queries and cache; a row sees seq_lens[r] keys with its last token, one less with each before."""

    def __init__(self, rows: list[tuple[int, int]], seed: int = 0) -> None:
        self.rows, self.generator = rows, torch.Generator().manual_seed(seed)
        self.lens = [computed + query for computed, query in rows]
        self.starts = [0, *itertools.accumulate(query for _, query in rows)]
        width = -(-MAX_LEN // BLOCK)
        blocks = torch.randperm(len(rows) * width, generator=self.generator)
        self.block_table = blocks.view(len(rows), width).int()
        self.caches = {name: self.randn(len(blocks), BLOCK, KV_HEADS, 2 * SIZE) for name in (*LAYERS, OTHER)}
        for r, length in enumerate(self.lens):
            for cache in self.caches.values():
                for p in range(length, width * BLOCK):
                    cache[self.block_table[r, p // BLOCK], p % BLOCK] = torch.nan
            self.block_table[r, -(-length // BLOCK) :] = STALE
        self.queries = {name: self.randn(self.starts[-1], HEADS, SIZE) for name in self.caches}

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def run(self, capture: TargetCapture) -> dict[str, torch.Tensor]:
        """One step through all layers; the output of each that is captured."""
        starts = torch.tensor(self.starts, dtype=torch.int32)
        seq_lens = torch.tensor(self.lens, dtype=torch.int32)
        step = capture.begin(starts, seq_lens, starts.clone())
        metadata = SpecAttnMetadata(
            num_reqs=len(self.rows),
            num_actual_tokens=self.starts[-1],
            max_query_len=max(query for _, query in self.rows),
            max_seq_len=max(self.lens),
            query_start_loc=starts,
            seq_lens=seq_lens,
            block_table=self.block_table,
            hook=step,
        )
        outputs = {}
        for name, cache in self.caches.items():
            query = self.queries[name]
            out = torch.full_like(query, torch.nan)
            # Token-major, as vLLM prefers.
            if step.attend(name, query, cache.transpose(1, 2), metadata, SCALE, out):
                outputs[name] = out
            else:
                assert out.isnan().all()
        return outputs

    # The oracle.

    def attention(self, name: str, r: int, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Softmax weights [HEADS, positions seen] of the i-th token of row r, and its output [HEADS, SIZE]."""
        p = torch.arange(self.lens[r] - (self.rows[r][1] - 1 - i))
        kv = self.caches[name][self.block_table[r, p // BLOCK], p % BLOCK].double()
        query = self.queries[name][self.starts[r] + i].double()
        weights, outputs = [], []
        for h in range(HEADS):
            key, value = kv[:, h // (HEADS // KV_HEADS)].split(SIZE, dim=-1)
            weights.append((SCALE * key @ query[h]).softmax(0))
            outputs.append(weights[-1] @ value)
        return torch.stack(weights), torch.stack(outputs)

    def ranked(self, r: int) -> int:
        """Positions of row r that are certain, and so ranked: up to the first token of a verification, all of a
        prompt's."""
        computed, query = self.rows[r]
        return self.lens[r] if query > LONGEST else max(computed + 1, 0) if self.lens[r] else 0

    def mass(self, name: str, r: int, dilation: int) -> list[float]:
        """Per position, the mean over all heads and the first and the last token (of a prompt, the last)."""
        length, query = self.ranked(r), self.rows[r][1]
        scored = (query - 1, query - 1) if query > LONGEST else (0, query - 1)
        rows = [self.attention(name, r, i)[0][:, :length].mean(0).tolist() for i in scored]
        sharp = [(a + b) / 2 for a, b in zip(*rows, strict=True)]
        return [max(sharp[max(p - dilation, 0) : p + 1]) / (dilation + 1) for p in range(length)]


HOW = pytest.mark.parametrize("changes", [{}, {"dilation": 3}, {"dilation": 5}], ids=str)
BATCHES = pytest.mark.parametrize(
    "rows",
    [
        pytest.param(MIXED, id="verifications, short chunks, prompts"),
        pytest.param(VERIFICATIONS, id="verifications"),
        pytest.param(PROMPTS, id="prompts"),
        pytest.param([(0, 70)], id="a prompt as long as may be"),
        pytest.param([(40, 4), EMPTY, EMPTY], id="rows without tokens"),
        pytest.param([(40, 4), PADDED, PADDED], id="rows without a request"),
    ],
)


@HOW
@BATCHES
def test_mass_is_the_mean_over_heads_and_both_rows(rows, changes, vegas, capture_of):
    step, opts = Step(rows), vegas(**changes)
    capture = capture_of(opts)
    step.run(capture)
    assert capture.lens[: len(rows)].tolist() == [step.ranked(r) for r in range(len(rows))]
    assert not capture.lens[len(rows) :].any()
    for (name, layer), r in itertools.product(LAYERS.items(), range(len(rows))):
        length = step.ranked(r)
        got = capture.mass[r, layer, 0]
        if length:
            wanted = torch.tensor(step.mass(name, r, opts.dilation))
            torch.testing.assert_close(got[:length], wanted, rtol=1e-4, atol=1e-6)
        # What is not ranked is nobody's: of rejected tokens, of padding.
        assert got[length:].isnan().all()


@HOW
@BATCHES
def test_the_selection_is_what_plain_python_chooses(rows, changes, choose, tokens, vegas, capture_of):
    step, opts = Step(rows, seed=1), vegas(**changes)
    capture = capture_of(opts)
    step.run(capture)
    lens = torch.tensor(step.lens, dtype=torch.int32)
    bits, prefix_lens = capture.select(lens > 0, lens)
    assert bits.shape == (len(rows), 2, 1, 3)
    assert prefix_lens.tolist() == [step.ranked(r) for r in range(len(rows))]
    assert prefix_lens.dtype == torch.int32
    for (name, layer), r in itertools.product(LAYERS.items(), range(len(rows))):
        wanted = choose(step.mass(name, r, opts.dilation), opts) if step.ranked(r) else set()
        assert tokens(bits[r, layer, 0]) == wanted, (name, r)


def test_on_this_data_the_ways_of_choosing_differ(choose, vegas):
    step = Step(MIXED, seed=1)
    for r in (0, 2, 5):
        ways = [step.mass("model.layers.0", r, d) for d in (0, 3)]
        last = step.attention("model.layers.0", r, step.rows[r][1] - 1)[0].mean(0)[: step.ranked(r)].tolist()
        chosen = {frozenset(choose(mass, vegas())) for mass in ways}
        assert len(chosen) == 2
        # A verification has a first row besides the last, a prompt has not.
        assert (choose(last, vegas()) == choose(ways[0], vegas())) == (r == 5)


@pytest.mark.parametrize("changes", [{"rule": "top_p", "top_p": 0.6}, {"max_tokens": 5}, {"min_tokens": 30}], ids=str)
def test_the_limits_are_those_of_every_method(changes, choose, tokens, vegas, capture_of):
    step, opts = Step(VERIFICATIONS), vegas(**changes)
    capture = capture_of(opts)
    step.run(capture)
    lens = torch.tensor(step.lens, dtype=torch.int32)
    bits, _ = capture.select(lens > 0, lens)
    for (name, layer), r in itertools.product(LAYERS.items(), range(len(VERIFICATIONS))):
        assert tokens(bits[r, layer, 0]) == choose(step.mass(name, r, 0), opts)


@BATCHES
def test_attention_is_that_of_a_layer_without_capture(rows, vegas, capture_of):
    step = Step(rows)
    outputs = step.run(capture_of(vegas()))
    assert outputs.keys() == LAYERS.keys()
    for name, r in itertools.product(outputs, range(len(rows))):
        out = outputs[name][step.starts[r] : step.starts[r + 1]]
        if not step.lens[r]:
            assert torch.equal(out, torch.zeros_like(out))
            continue
        wanted = [step.attention(name, r, i)[1] for i in range(rows[r][1])]
        torch.testing.assert_close(out.double(), torch.stack(wanted), rtol=1e-4, atol=1e-5)


@HOW
def test_a_row_s_mass_sums_to_one_at_most(changes, vegas, capture_of):
    """The selection computes in fixed point, which overflows at 2."""
    step, opts = Step(MIXED), vegas(**changes)
    capture = capture_of(opts)
    step.run(capture)
    sums = torch.stack([capture.mass[r, :, :, : step.ranked(r)].sum(-1) for r in range(len(MIXED))])
    assert 0.2 < sums.max() <= 1 + 1e-5


def test_rows_that_are_not_wanted_get_nothing(choose, tokens, vegas, capture_of):
    """A chunk inside its prompt: nothing is drafted for it."""
    step, opts = Step(MIXED), vegas()
    capture = capture_of(opts)
    step.run(capture)
    wanted = torch.tensor([True, False, True, False, False, True, False])
    bits, prefix_lens = capture.select(wanted, torch.tensor(step.lens, dtype=torch.int32))
    assert prefix_lens.tolist() == [41, 0, 34, 0, 0, 30, 0]
    assert not bits[~wanted].any()
    for r in (0, 2, 5):
        assert tokens(bits[r, 1, 0]) == choose(step.mass("model.layers.2", r, 0), opts)


@pytest.mark.parametrize(("committed", "ranked"), [(44, 41), (42, 41), (41, 41), (38, 38), (1, 1)])
def test_what_is_ranked_ends_where_the_row_does(committed, ranked, choose, tokens, vegas, capture_of):
    """Of a verification, however much of it was accepted, up to its first token; and never past what the row has, as
    where vLLM pads the last token of a prompt to a verification's length."""
    step, opts = Step([(40, 4)]), vegas()
    capture = capture_of(opts)
    step.run(capture)
    bits, prefix_lens = capture.select(torch.tensor([True]), torch.tensor([committed], dtype=torch.int32))
    assert prefix_lens.tolist() == [ranked]
    mass = step.mass("model.layers.0", 0, 0)
    assert tokens(bits[0, 0, 0]) == choose(mass[:ranked], opts)


def test_steps_of_different_sizes_do_not_see_each_other(choose, tokens, vegas, capture_of):
    opts = vegas(dilation=2)
    capture = capture_of(opts)
    for seed, rows in enumerate((MIXED, [(9, 4)], [(66, 4), (40, 4)], PROMPTS, VERIFICATIONS)):
        step = Step(rows, seed)
        capture.mass.fill_(1e9)
        capture.scores.fill_(1e9)
        step.run(capture)
        lens = torch.tensor(step.lens, dtype=torch.int32)
        bits, prefix_lens = capture.select(lens > 0, lens)
        assert prefix_lens.tolist() == [step.ranked(r) for r in range(len(rows))]
        for (name, layer), r in itertools.product(LAYERS.items(), range(len(rows))):
            assert tokens(bits[r, layer, 0]) == choose(step.mass(name, r, 2), opts)


def test_what_a_graph_holds_stays_at_its_address(vegas, capture_of):
    """Attention, in the target's graph, writes where the selection, in the round's graph, reads."""
    capture = capture_of(vegas())
    kept = {name: tensor.data_ptr() for name, tensor in vars(capture).items() if isinstance(tensor, torch.Tensor)}
    for rows in (MIXED, VERIFICATIONS):
        step = Step(rows)
        step.run(capture)
        lens = torch.tensor(step.lens, dtype=torch.int32)
        bits, _ = capture.select(lens > 0, lens)
        assert bits.data_ptr() == kept["bits"]
    assert kept == {name: tensor.data_ptr() for name, tensor in vars(capture).items() if name in kept}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, set from the start")
@pytest.mark.parametrize("changes", [{}, {"dilation": 3}], ids=str)
def test_the_kernels_select_the_same(changes, choose, tokens, vegas, capture_of):
    rows = [(40, 4), (17, 1), PADDED]
    step, opts = Step(rows), vegas(**changes)
    capture = capture_of(opts, executor="triton")
    step.run(capture)
    lens = torch.tensor(step.lens, dtype=torch.int32)
    bits, prefix_lens = capture.select(lens > 0, lens)
    assert prefix_lens.tolist() == [41, 18, 0]
    for (name, layer), r in itertools.product(LAYERS.items(), range(2)):
        assert tokens(bits[r, layer, 0]) == choose(step.mass(name, r, opts.dilation), opts)
    assert not bits[2].any()


@pytest.mark.parametrize("changes", [{}, {"dilation": 3}], ids=str)
def test_its_size_is_that_of_its_buffers(changes, vegas, capture_of):
    opts = vegas(**changes)
    made = capture_of(opts).nbytes
    assert made["scores"] == 4 * MAX_REQS * 2 * HEADS * (MAX_LEN + 1)  # with their logsumexp
    # Two layers, and the row before it is spread.
    assert made["mass"] == 4 * MAX_REQS * MAX_LEN * (2 + bool(opts.dilation))
    assert made["bitmasks"] == 4 * MAX_REQS * 2 * (3 + 1)
