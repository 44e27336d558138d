"""The evaluation's baselines against the same in plain loops, on caches whose blocks lie in no order."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from specattn_vllm import executors
from specattn_vllm.evaluation.baselines import Baseline
from specattn_vllm.evaluation.schema import Channels, MeanStd, Oracle, Quest, Setting
from specattn_vllm.stats import Counters

HEADS, GROUP, SIZE, BLOCK = 2, 3, 64, 16
SCALE = 0.7 / math.sqrt(SIZE)
CPU = torch.device("cpu")
# (tokens in the step, length with them, whether it still prefills): a block's edge, one token, a prefix shorter than a
# page, short and long prompts.
BATCH = [(5, 101, False), (5, 85, False), (1, 48, False), (3, 9, False), (4, 40, True), (30, 30, True)]
DENSE_ROWS = [4, 5]


class Step:
    """A batch over a cache that is poisoned wherever no token lies."""

    def __init__(self, batch=BATCH, dtype=torch.float32) -> None:
        make = torch.Generator().manual_seed(3)
        counts, lens, prefilling = (list(column) for column in zip(*batch, strict=True))
        tokens, blocks = sum(counts), max(lens) // BLOCK + 2
        self.cache = torch.full((blocks * len(batch) + 1, HEADS, BLOCK, 2 * SIZE), torch.nan, dtype=dtype)
        order = torch.randperm(self.cache.shape[0], generator=make)
        self.table = order[: blocks * len(batch)].view(len(batch), blocks).int()
        self.keys = torch.randn(len(batch), max(lens), HEADS, SIZE, generator=make).to(dtype)
        self.values = torch.randn(len(batch), max(lens), HEADS, SIZE, generator=make).to(dtype)
        for row, length in enumerate(lens):
            for position in range(length):
                entry = self.cache[int(self.table[row, position // BLOCK]), :, position % BLOCK]
                entry.copy_(torch.cat([self.keys[row, position], self.values[row, position]], -1))
            self.table[row, -(-length // BLOCK) :] = 2**30  # no block of ours
        self.query = torch.randn(tokens, HEADS * GROUP, SIZE, generator=make).mul(2).to(dtype)
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        self.counts, self.lens, self.starts = counts, lens, starts.tolist()
        self.common = SimpleNamespace(
            req_idx=list(range(len(batch))),
            is_prefilling=torch.tensor(prefilling),
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor(lens).int(),
            block_table=self.table,
            max_query_len=max(counts),
            max_seq_len=max(lens) + 7,  # vLLM's is a bound
        )
        self.counters = Counters(CPU)

    def attend(self, options, layer: str = "layer 2") -> torch.Tensor:
        operations = executors.resolve("torch", CPU)
        baseline = Baseline(options, operations, self.counters, ["layer 0", "layer 1", "layer 2"])
        out = torch.full_like(self.query, torch.nan)
        assert baseline.begin(self.common).attend(layer, self.query, self.cache, self.common, SCALE, out)
        self.counters.commit()
        return out

    def logits(self, row: int, head: int) -> list[torch.Tensor]:
        """For each query head of a KV head and each token of the row, over the positions that it sees."""
        first = self.lens[row] - self.counts[row]
        return [
            self.keys[row, : first + i + 1, head].double() @ self.query[self.starts[row] + i, query].double() * SCALE
            for query in range(head * GROUP, (head + 1) * GROUP)
            for i in range(self.counts[row])
        ]

    def expected(self, kept: dict[tuple[int, int], set[int]]) -> torch.Tensor:
        """Attention to the kept positions of the prefix (all, where none are given for a row and KV head) and to what
        the step's own tokens see of each other."""
        out = torch.empty(self.query.shape, dtype=torch.float64)
        for row, count in enumerate(self.counts):
            first = self.lens[row] - count
            for query in range(HEADS * GROUP):
                head = query // GROUP
                chosen = sorted(kept.get((row, head), range(first)))
                logits = self.logits(row, head)[(query % GROUP) * count : (query % GROUP + 1) * count]
                for i in range(count):
                    read = [*chosen, *range(first, first + i + 1)]
                    weights = logits[i][read].softmax(0)
                    out[self.starts[row] + i, query] = weights @ self.values[row, read, head].double()
        return out


def verifying() -> list[tuple[int, int]]:
    return [(row, head) for row in range(len(BATCH)) if row not in DENSE_ROWS for head in range(HEADS)]


def tokens_of(ratio: float, length: int) -> int:
    return -(-length * round(ratio * 65536) // 65536)


def oracle_mass(step: Step, row: int, head: int) -> list[float]:
    first = step.lens[row] - step.counts[row]
    rows = [logits.softmax(0)[:first] for logits in step.logits(row, head)]
    return torch.stack(rows).mean(0).tolist()


def top_k(mass: list[float], count: int) -> set[int]:
    return set(sorted(range(len(mass)), key=lambda p: -mass[p])[:count])


def assert_same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert torch.allclose(found.double(), expected, atol=tolerance, rtol=tolerance), (found - expected).abs().max()


def assert_counted(step: Step, kept: dict[tuple[int, int], set[int]], searched: int = 0) -> None:
    counts = step.counters.read()
    own = sum(HEADS * step.counts[row] for row in range(len(BATCH)) if row not in DENSE_ROWS)
    assert (counts.kv_read, counts.kv_scanned) == (sum(map(len, kept.values())) + own, searched)
    assert counts.kv_full == sum(step.lens[row] for row, _ in verifying())
    assert counts.verify_rows == counts.sparse_rows == len(BATCH) - len(DENSE_ROWS)


@pytest.mark.parametrize("ratio", [0.2, 0.01])
def test_oracle_keeps_the_heaviest_of_each_head(ratio):
    step = Step()
    found = step.attend(Oracle(name="oracle", ratio=ratio))
    kept = {}
    for row, head in verifying():
        mass = oracle_mass(step, row, head)
        kept[row, head] = top_k(mass, tokens_of(ratio, len(mass)))
    assert any(kept[row, 0] != kept[row, 1] for row, _ in verifying())
    assert_same(found, step.expected(kept))
    assert_counted(step, kept)


def test_an_oracle_of_everything_is_full_attention():
    step = Step()
    found = step.attend(Oracle(name="oracle", ratio=1))
    assert_same(found, step.expected({}))
    counts = step.counters.read()
    assert counts.kv_read == counts.kv_full


def queries_of(step: Step, row: int, head: int) -> torch.Tensor:
    """[tokens x query heads, D] float64"""
    span = slice(step.starts[row], step.starts[row + 1])
    return step.query[span, head * GROUP : (head + 1) * GROUP].double().flatten(0, 1)


def best_pages(step: Step, row: int, head: int, ratio: float, page: int, score, *, first: bool = False) -> set[int]:
    """Pages by the mean over queries of the softmax of score(queries, keys), the last of the prefix always."""
    end = step.lens[row] - step.counts[row]
    pages = [range(begin, min(begin + page, end)) for begin in range(0, end, page)]
    queries = queries_of(step, row, head)
    scores = [score(queries, step.keys[row, list(of), head].double()) * SCALE for of in pages]
    mean = torch.stack(scores, -1).softmax(-1).mean(0).tolist()
    count = -(-tokens_of(ratio, end) // page)
    order = sorted(range(len(pages) - 1), key=lambda p: (not (first and p == 0), -mean[p]))
    return {position for p in [len(pages) - 1, *order][:count] for position in pages[p]}


def quest(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return torch.maximum(queries * keys.amin(0), queries * keys.amax(0)).sum(-1)


def mean_std(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return queries @ keys.mean(0) + queries.abs() @ keys.std(0, correction=0)


@pytest.mark.parametrize(("ratio", "page"), [(0.3, 16), (0.5, 8), (0.4, 10), (1.0, 16), (0.001, 16)])
def test_quest_reads_the_pages_of_the_largest_bounds(ratio, page):
    step = Step()
    found = step.attend(Quest(name="quest", ratio=ratio, page_size=page))
    kept = {(row, head): best_pages(step, row, head, ratio, page, quest) for row, head in verifying()}
    assert_same(found, step.expected(kept))
    searched = sum(-(-(step.lens[row] - step.counts[row]) // page) * page for row, _ in verifying())
    assert_counted(step, kept, searched)


@pytest.mark.parametrize(("ratio", "page"), [(0.3, 16), (0.5, 8), (0.4, 10), (0.001, 16)])
def test_pages_of_the_largest_means_and_deviations(ratio, page):
    step = Step()
    found = step.attend(MeanStd(name="mean_std", ratio=ratio, page_size=page))
    kept = {(row, head): best_pages(step, row, head, ratio, page, mean_std, first=True) for row, head in verifying()}
    assert sum(0 in of for of in kept.values()) >= 4 or ratio < 0.01
    assert_same(found, step.expected(kept))
    searched = sum(-(-(step.lens[row] - step.counts[row]) // page) * page for row, _ in verifying())
    assert_counted(step, kept, searched)


@pytest.mark.parametrize(("ratio", "channels"), [(0.2, 16), (0.4, 3), (0.01, 16), (0.3, SIZE)])
def test_channels_keep_the_heaviest_by_a_part_of_each_key(ratio, channels):
    step = Step()
    found = step.attend(Channels(name="channels", ratio=ratio, channels=channels))
    kept = {}
    for row, head in verifying():
        end = step.lens[row] - step.counts[row]
        keys, queries = step.keys[row, :end, head].double(), queries_of(step, row, head)
        worth = (queries.abs().mean(0) * keys.abs().mean(0)).tolist()
        few = sorted(range(SIZE), key=lambda d: -worth[d])[:channels]
        mass = (queries[:, few] @ keys[:, few].T * SCALE).softmax(-1).mean(0).tolist()
        kept[row, head] = top_k(mass, tokens_of(ratio, end))
    assert_same(found, step.expected(kept))
    assert_counted(step, kept, sum(step.lens[row] - step.counts[row] for row, _ in verifying()))


def test_a_page_of_one_token_bounds_its_score_exactly():
    step = Step([(1, 60, False)])
    found = step.attend(Quest(name="quest", ratio=0.25, page_size=1))
    for head in range(HEADS):
        mass = torch.stack([logits[:59].softmax(0) for logits in step.logits(0, head)]).mean(0)[:58].tolist()
        kept = {58, *top_k(mass, 14)}
        expected = step.expected({(0, head): kept})[:, head * GROUP : (head + 1) * GROUP]
        assert_same(found[:, head * GROUP : (head + 1) * GROUP], expected)


def test_layers_that_stay_dense_read_everything_and_are_counted():
    step = Step()
    found = step.attend(Quest(name="quest", ratio=0.1), "layer 1")
    assert_same(found, step.expected({}))
    counts = step.counters.read()
    assert counts.kv_read == counts.kv_full == sum(step.lens[row] for row, _ in verifying())


def test_half_precision_is_rounded_at_the_end():
    step = Step(dtype=torch.bfloat16)
    found = step.attend(Oracle(name="oracle", ratio=0.2))
    assert found.dtype == torch.bfloat16
    kept = {
        of: top_k(oracle_mass(step, *of), tokens_of(0.2, step.lens[of[0]] - step.counts[of[0]])) for of in verifying()
    }
    assert_same(found, step.expected(kept), 2e-2)


def test_prompts_and_profiling_are_left_alone():
    baseline = Baseline(Oracle(name="oracle", ratio=0.5), executors.resolve("torch", CPU), Counters(CPU), ["a"])
    assert baseline.begin(Step([(30, 30, True), (2, 40, True)]).common) is None
    profiling = Step().common
    profiling.req_idx = None
    assert baseline.begin(profiling) is None


def test_channels_that_a_key_does_not_have_are_refused():
    with pytest.raises(ValueError, match=f"channels {SIZE + 1}, but keys have {SIZE} elements"):
        Step().attend(Channels(name="channels", ratio=0.2, channels=SIZE + 1))


def test_dense_layers_leave_something_to_select_in():
    with pytest.raises(ValueError, match="dense_layers 2 leaves none of the target's 2 layers"):
        Baseline(Quest(name="quest", ratio=0.5), executors.resolve("torch", CPU), Counters(CPU), ["a", "b"])


@pytest.mark.parametrize(
    ("baseline", "options", "message"),
    [
        ({"name": "oracle"}, {"method": "dense"}, "Field required"),
        ({"name": "quest", "ratio": 0.5}, {"method": "specattn"}, "reads in the place of the plugin, not beside it"),
        ({"name": "quest", "ratio": 0.5}, {}, "reads in the place of the plugin, not beside it"),
        ({"name": "quest", "ratio": 1.5}, {"method": "dense"}, "less than or equal to 1"),
        ({"name": "quest", "ratio": 0.5, "shared": True}, {"method": "dense"}, "Extra inputs are not permitted"),
        ({"name": "h2o", "ratio": 0.5}, {"method": "dense"}, "'quest', 'mean_std', 'channels', 'oracle'"),
    ],
)
def test_baselines_that_make_no_sense_are_refused(baseline, options, message):
    with pytest.raises(ValidationError, match=message):
        Setting(name="x", options=options, baseline=baseline)
