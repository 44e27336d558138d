"""A draft model's rounds, and what a plain loop in float64 says about them."""

from __future__ import annotations

import functools
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from specattn_vllm import executors
from specattn_vllm.kernels.reference import unpack_bits
from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.selection.capture import DraftCapture
from specattn_vllm.selection.choose import Limits
from specattn_vllm.selection.target_capture import TargetCapture

CPU = torch.device("cpu")
HEADS, KV_HEADS, SIZE, BLOCK = 4, 2, 64, 16
MAX_LEN, MAX_REQS, STEPS = 70, 5, 3  # 70 fills no whole number of words
SCALE = 0.4  # sharper than 1 / sqrt(64), so that top-p has something to choose
SOURCES = ("draft.layers.0", "draft.layers.2")  # of three
# Following one of these is an index error; vLLM does not clear a block table between requests.
STALE = 1_000_000


def _options(combine: str = "sum", **changes) -> SpecAttnOptions:
    base = {"method": "specattn", "min_tokens": 0, "sink_tokens": 1, "recent_tokens": 2}
    if "ratio" not in changes:
        base["top_p"] = 0.7
    return SpecAttnOptions.parse({"combine": combine, **(base | changes)})


def _make(opts: SpecAttnOptions, executor: str = "torch") -> DraftCapture:
    return DraftCapture(
        opts,
        executors.resolve(executor, CPU),
        layer_sources={name: s for s, name in enumerate(SOURCES)},
        num_heads=HEADS,
        num_steps=STEPS,
        max_num_reqs=MAX_REQS,
        max_model_len=MAX_LEN,
        device=CPU,
        score_dtype=torch.float32,
        groups=KV_HEADS if opts.kind.per_head else 1,
    )


class Draft:
    """A draft model's cache and queries for one round.

    The sampled token of request r sees lens[r] keys at step 0, and one more each step. At step 0 it has before[r]
    tokens of its request before it, and after[r] rejected ones behind it.
    """

    def __init__(self, lens: list[int], seed: int = 0, before: list[int] | None = None) -> None:
        self.lens, self.generator = lens, torch.Generator().manual_seed(seed)
        self.rows = len(lens)
        self.before = before or [min(r % 3, n - 1) for r, n in enumerate(lens)]
        self.after = [(r + 1) % 3 for r in range(self.rows)]
        stretch = [b + 1 + a for b, a in zip(self.before, self.after, strict=True)]
        self.starts = [0, *itertools.accumulate(stretch)]
        self.query_rows = torch.tensor([self.starts[r] + self.before[r] for r in range(self.rows)])
        width = -(-(MAX_LEN + STEPS) // BLOCK)
        blocks = torch.randperm(self.rows * width, generator=self.generator)
        self.block_table = blocks.view(self.rows, width).int()
        self.caches = {name: self._cache(len(blocks)) for name in ("other", *SOURCES)}
        for r, n in enumerate(lens):
            used = -(-(n + max(self.after[r], STEPS - 1)) // BLOCK)
            self.block_table[r, used:] = STALE
        self.queries = {
            (name, k): self.randn(self.starts[-1] if k == 0 else self.rows, HEADS, SIZE)
            for name in self.caches
            for k in range(STEPS)
        }
        self.memory: dict = {}

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def _cache(self, blocks: int) -> torch.Tensor:
        # Token-major, as vLLM prefers. What no step may read is NaN.
        cache = self.randn(blocks, BLOCK, KV_HEADS, 2 * SIZE).transpose(1, 2)
        for r, n in enumerate(self.lens):
            for p in range(n + max(self.after[r], STEPS - 1), self.block_table.shape[1] * BLOCK):
                cache[self.block_table[r, p // BLOCK], :, p % BLOCK] = torch.nan
        return cache

    def batch(self, k: int) -> SimpleNamespace:
        """What vLLM says about step k."""
        starts = self.starts if k == 0 else range(self.rows + 1)
        more = self.after if k == 0 else [k] * self.rows
        return SimpleNamespace(
            query_start_loc=torch.tensor([*starts], dtype=torch.int32),
            seq_lens=torch.tensor([n + m for n, m in zip(self.lens, more, strict=True)], dtype=torch.int32),
            block_table=self.block_table,
            max_query_len=max(b - a for a, b in itertools.pairwise(starts)),
        )

    def run(
        self,
        capture: DraftCapture,
        wanted: list[bool],
        after_layer=None,
    ) -> list[dict]:
        """One round; returns per step {layer: (whether attention was done, its output)}."""
        capture.begin_round(torch.tensor(wanted))
        steps = []
        for k in range(STEPS):
            if k == 0:
                capture.begin_step(0, self.query_rows, torch.tensor(self.lens))
            else:
                capture.begin_step(k, None, None)
            results = {}
            for name, cache in self.caches.items():
                query = self.queries[name, k]
                out = torch.full_like(query, torch.nan)
                done = capture.attend(name, query, cache, self.batch(k), SCALE, out)
                results[name] = (done, out)
                if after_layer is not None and name in capture.layer_sources:
                    after_layer(k, capture.layer_sources[name])
            capture.end_step()
            steps.append(results)
        return steps

    # The oracle.

    def attention(self, name: str, query: torch.Tensor, r: int, read) -> tuple[torch.Tensor, torch.Tensor]:
        """Softmax attention [HEADS, len(read)] of a query [HEADS, SIZE] over positions of request r, and its output."""
        p = torch.tensor([*read])
        kv = self.caches[name][self.block_table[r, p // BLOCK], :, p % BLOCK].double().transpose(0, 1)
        weights, outputs = [], []
        for h in range(HEADS):
            key, value = kv[h // (HEADS // KV_HEADS)].split(SIZE, dim=-1)
            weights.append((SCALE * key @ query[h].double()).softmax(0))
            outputs.append(weights[-1] @ value)
        return torch.stack(weights), torch.stack(outputs)

    def step_output(self, name: str, k: int, r: int) -> torch.Tensor:
        """What a layer's attention gives for request r in step k: [tokens, HEADS, SIZE], rejected ones included."""
        query = self.queries[name, k]
        if k > 0:
            return self.attention(name, query[r], r, range(self.lens[r] + k))[1][None]
        tokens = range(self.starts[r], self.starts[r + 1])
        seen = range(self.lens[r] - self.before[r], self.lens[r] + self.after[r] + 1)
        return torch.stack([self.attention(name, query[t], r, range(n))[1] for t, n in zip(tokens, seen, strict=True)])

    def step_mass(self, name: str, r: int, group: int | None = None) -> list[list[float]]:
        """The mass of each step on the committed context of request r, averaged over query heads: all, or those of a
        KV head."""
        known = self.memory.setdefault((name, r, group), [])
        each = HEADS // KV_HEADS
        heads = slice(None) if group is None else slice(group * each, (group + 1) * each)
        while len(known) < STEPS:
            k = len(known)
            query = self.queries[name, k][int(self.query_rows[r]) if k == 0 else r]
            weights = self.attention(name, query, r, range(self.lens[r] + k))[0][heads].mean(0).tolist()
            known.append(weights[: self.lens[r] - 1])
        return known

    def combined(self, name: str, r: int, group: int | None = None) -> list[float]:
        """One mass per token, in the units of a single step."""
        steps = self.step_mass(name, r, group)
        return [sum(masses) / len(steps) for masses in zip(*steps, strict=True)]

    def selection(self, opts: SpecAttnOptions, name: str, r: int, group: int | None = None) -> set[int]:
        if opts.combine == "union":
            return set().union(*(top_p(mass, opts) for mass in self.step_mass(name, r, group)))
        return top_p(self.combined(name, r, group), opts)


def top_p(mass: list[float], opts: SpecAttnOptions) -> set[int]:
    """The forced tokens, then by mass until the share is reached, between floor and cap; a fixed budget is a cap."""
    share, fraction = opts.top_p, opts.max_fraction
    if opts.fixed_budget:
        share, fraction = 1, min(opts.ratio, fraction)
    n = len(mass)
    forced = {p for p in range(n) if p < opts.sink_tokens or p >= n - opts.recent_tokens}
    order = sorted(forced) + sorted(set(range(n)) - forced, key=lambda p: (-mass[p], -p))
    count, total = len(forced), sum(mass)
    while count < n and (share == 1 or sum(mass[p] for p in order[:count]) < share * total):
        count += 1
    cap = min(n, max(math.ceil(n * fraction), opts.min_tokens), n if opts.max_tokens is None else opts.max_tokens)
    cap = max(cap, len(forced))
    return set(order[: max(min(count, cap), min(opts.min_tokens, cap))])


@pytest.fixture(scope="session")
def sources():
    return SOURCES


@pytest.fixture(scope="session")
def options():
    """options(combine, **changes): options under which some tokens are kept and some are not."""
    return _options


@pytest.fixture(scope="session")
def make():
    """make(options, executor='torch'): a capture of the two layers."""
    return _make


@pytest.fixture(scope="session")
def new_draft():
    """new_draft(lens, ...): a draft that a test may change."""
    return Draft


@pytest.fixture(scope="session")
def draft_of():
    """draft_of(*lens, seed=0): a draft that tests share, because the oracle takes most of their time."""

    @functools.cache
    def draft(*lens: int, seed: int = 0) -> Draft:
        return Draft([*lens], seed)

    return draft


@pytest.fixture(scope="session")
def tokens():
    """tokens(bits): the positions whose bit is set."""
    return lambda bits: set(unpack_bits(bits, 32 * bits.shape[-1]).nonzero().flatten().tolist())


@pytest.fixture(scope="session")
def choose():
    """choose(mass, options): the positions to keep by a list of masses."""
    return top_p


# Of a target that drafts for itself

TARGET_LAYERS = {"model.layers.0": 0, "model.layers.2": 1}


@pytest.fixture
def vegas():
    """vegas(**changes) -> options."""
    return vegas_options


@pytest.fixture
def capture_of():
    """capture_of(options, executor) -> a capture of verifications of up to four tokens, whose buffers are poisoned."""
    return target_capture


def vegas_options(**changes) -> SpecAttnOptions:
    base = {"method": "vegas", "ratio": 0.25, "min_tokens": 0, "sink_tokens": 1, "recent_tokens": 2, "dilation": 0}
    return SpecAttnOptions.parse(base | changes)


def target_capture(opts: SpecAttnOptions, executor: str = "torch") -> TargetCapture:
    made = TargetCapture(
        executors.resolve(executor, CPU),
        Limits.of(opts),
        layer_sources=TARGET_LAYERS,
        num_heads=HEADS,
        max_query_len=4,
        max_num_reqs=8,
        max_model_len=MAX_LEN,
        dilation=opts.dilation,
        device=CPU,
        score_dtype=torch.float32,
    )
    poison(made)
    return made


def poison(capture: TargetCapture) -> None:
    """Nothing that an earlier step left, or nobody wrote, may pass for a result."""
    for tensor in (capture.scores, capture.lse, capture.mass):
        tensor.fill_(torch.nan)
    if capture.dilation:
        capture._sharp.fill_(torch.nan)
    capture.bits.fill_(-1)
    for tensor in (capture.counts, capture.scored_rows, capture.lens):
        tensor.fill_(7)
