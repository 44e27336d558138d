"""Method 'sketch': the search of a layer, operation by operation, and attention over what it chooses.

The operations are called as an engine's layer calls them (`specattn_vllm/sketch/layer.py`): that layer is run up to the
operation at hand, and what it hands to it is what is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NoReturn

import torch

from specattn_vllm import executors
from specattn_vllm.bench import kernel_shapes as shapes
from specattn_vllm.bench.kernel_bench import Bench, Calls, relative_error
from specattn_vllm.bench.kernel_data import Arena, requests
from specattn_vllm.bench.kernel_report import Row
from specattn_vllm.bench.kernel_shapes import BLOCK_SIZE, VERIFY_LEN, Batch, Heads, Pair
from specattn_vllm.bench.kernel_verify import fa3_dense
from specattn_vllm.kernels.sketch.layout import SketchLayout
from specattn_vllm.options import SpecAttnOptions

BITS = 2
KEPT = 0.08
SEARCH = ("prepare_queries", "score_tokens", "cut_scores", "list_pages")
"""What each layer runs before its attention, in this order."""
ONCE = "carry_thresholds"
"""What the first layer of a step runs besides, after its scores."""
KEYS_AT_A_TIME = 1 << 16


class _Reached(Exception):
    """The operation at hand is about to be called."""


class Search:
    """Layers of a batch with sketched caches, and what they share, as an engine has them."""

    def __init__(self, bench: Bench, heads: Heads, batch: Batch, fraction: float) -> None:
        from specattn_vllm.selection.own_choice import ChoiceStep
        from specattn_vllm.sketch.budget import budget_of
        from specattn_vllm.sketch.layer import LayerSketch
        from specattn_vllm.sketch.step import Shape, Sketch
        from specattn_vllm.stats import Counters

        device = bench.device
        self.heads, self.batch, self.bench = heads, batch, bench
        self.layout = SketchLayout(heads.kv, BLOCK_SIZE, heads.size, BITS, bench.element)
        self.operations = executors.resolve("auto", device, bench.dtype, per_head=True)
        # Its own memory: codes are no keys and values that other groups could read.
        self.caches = Arena(device, bench.dtype).layers(heads, batch, self.layout.tail_bytes // bench.element)
        self.req = requests(heads, batch, VERIFY_LEN, device, bench.dtype)
        # A context that a test can afford has to be searched too, not read whole.
        least = {"min_tokens": min(128, batch.context // 32), "recent_tokens": min(64, batch.context // 32)}
        self.options = SpecAttnOptions.parse({"method": "sketch", "sketch_bits": BITS, "ratio": fraction, **least})
        shape = Shape(
            layers=len(self.caches), num_heads=heads.query, num_kv_heads=heads.kv, head_size=heads.size,
            dtype=bench.dtype, max_query_len=VERIFY_LEN, max_num_reqs=batch.rows,
            max_model_len=-(-batch.context // 64) * 64,
        )  # fmt: skip
        budget = budget_of(self.options, self.options.shared_budget)
        self.sketch = Sketch(self.operations, budget, BITS, shape, Counters(device), device)
        self.sketch.dense.zero_()
        self.sketch.slots.copy_(torch.arange(batch.rows))
        self.step = ChoiceStep(batch.rows, batch.rows * VERIFY_LEN, VERIFY_LEN)
        self.layers = [LayerSketch(self.sketch, index) for index in range(len(self.caches))]
        for layer, cache in zip(self.layers, self.caches, strict=True):
            _sketch_all(layer, cache, heads.size)

    @property
    def scale(self) -> float:
        return self.heads.size**-0.5

    def select(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What a layer chooses: page table [R, H, width] and kept [R, H], int32."""
        req = self.req
        return self.layers[index].select(
            self.step, req.query, self.caches[index], req.block_table, req.seq_lens, req.query_start_loc, self.scale
        )

    def calls_of(self, name: str) -> Calls:
        """The calls of one operation of the search, a layer's each, after what comes before it in the layer."""
        calls: list[Callable[[], None]] = []
        if name in (ONCE, "cut_scores", "list_pages"):
            self.settle()

        def hold(*arguments) -> NoReturn:
            calls.append(partial(getattr(self.operations, name), *arguments))
            raise _Reached

        self.sketch.operations = replace(self.operations, **{name: hold})
        try:
            for index in range(len(self.layers)):
                try:
                    self.select(index)
                except _Reached:
                    continue
        finally:
            self.sketch.operations = self.operations
        return calls

    def settle(self) -> None:
        """Two whole steps: the second is as all of a request's but the first, which finds no threshold carried over."""
        for _ in range(2):
            for index in range(len(self.layers)):
                self.select(index)

    def encode_calls(self) -> Calls:
        """The new keys and values of a step into each layer's cache, and the keys into its sketch."""
        heads, req = self.heads, self.req
        shape = (2, self.step.num_tokens, heads.kv, heads.size)
        key, value = torch.randn(shape, device=self.bench.device).to(self.bench.dtype)
        new = self.batch.context - VERIFY_LEN + torch.arange(VERIFY_LEN, device=key.device)
        slots = (req.block_table[:, new // BLOCK_SIZE].long() * BLOCK_SIZE + new % BLOCK_SIZE).flatten()
        layers = zip(self.layers, self.caches, strict=True)
        return [partial(layer.write, key, value, cache, slots) for layer, cache in layers]

    def attention_calls(self) -> Calls:
        """Attention over what the last layer chose, in the cache of each."""
        req = self.req
        self.settle()
        table, kept = self.select(len(self.layers) - 1)
        return [
            partial(
                self.operations.sparse_attention, req.query, cache, table, kept, req.query_start_loc, self.scale,
                req.out, VERIFY_LEN,
            )
            for cache in self.caches
        ]  # fmt: skip

    def kept_tokens(self) -> int:
        """Entries of a head on average, by the budget."""
        context = self.batch.context - VERIFY_LEN
        fixed = self.sketch.budget.fixed_ratio
        return min(max((context * fixed + 65535) >> 16, self.sketch.budget.min_tokens), context) + VERIFY_LEN


def _sketch_all(layer, cache: torch.Tensor, size: int) -> None:
    """Sketch every key of a cache [B, H, N, 2D]."""
    blocks = max(KEYS_AT_A_TIME // BLOCK_SIZE, 1)
    for first in range(0, cache.shape[0], blocks):
        part = cache[first : first + blocks].transpose(1, 2)
        slots = torch.arange(part.shape[0] * BLOCK_SIZE, device=cache.device) + first * BLOCK_SIZE
        entries = part.reshape(-1, *part.shape[2:])
        layer.write(entries[..., :size], entries[..., size:], cache, slots)


def search(bench: Bench, batch: Batch, pair: Pair, fractions: Sequence[float]) -> None:
    """The search and what follows it, once for each kept share; what does not depend on the share only once."""
    heads = pair.target
    shape = f"{batch} {heads} q{VERIFY_LEN}"
    dense = None
    paid: dict[str, Row] = {}
    for fraction in fractions:
        it = Search(bench, heads, batch, fraction)
        if dense is None:
            dense = fa3_dense(bench, "sketch", batch, heads, it.req, it.caches, VERIFY_LEN)
            bench.measure(
                "sketch", "encode_keys", shape, it.encode_calls,
                shapes.encode_bytes(heads, batch.rows * VERIFY_LEN, bench.element, it.layout.token_bytes), bits=BITS,
            )  # fmt: skip
        _operations(bench, it, shape, fraction, paid)
        _attention(bench, it, shape, fraction, paid, dense)
        del it
        bench.tidy()


def _operations(bench: Bench, it: Search, shape: str, fraction: float, paid: dict[str, Row]) -> None:
    heads, batch, token = it.heads, it.batch, it.layout.token_bytes
    width = it.sketch.packed.shape[2]
    nbytes = {
        "prepare_queries": shapes.prepare_bytes(heads, batch, bench.element, token, width),
        "score_tokens": shapes.scan_bytes(heads, batch, token, width),
        ONCE: shapes.carry_bytes(batch),
        "cut_scores": shapes.cut_bytes(heads, batch),
        "list_pages": shapes.list_bytes(heads, batch, it.kept_tokens()),
    }
    for name in (*SEARCH[:2], ONCE, *SEARCH[2:]):
        by_share = name in ("cut_scores", "list_pages")
        if not by_share and name in paid:
            continue
        more = {"kept": fraction} if by_share else {}
        what = f", {fraction:.0%}" if by_share else ", once a step" if name == ONCE else ""
        check = partial(_check_scores, it) if name == "score_tokens" else None
        paid[name] = bench.measure(
            "sketch", f"{name}{what}", shape, partial(it.calls_of, name), nbytes[name], check=check, bits=BITS, **more,
        )  # fmt: skip


def _check_scores(it: Search) -> float:
    """The last layer's scores against the reference, as bins."""
    from specattn_vllm.kernels.sketch import reference

    [*_, last] = it.calls_of("score_tokens")
    last()
    got = it.sketch.scores.clone()
    it.sketch.scores.fill_(0)
    reference.score_tokens(*last.args)
    context = it.batch.context - VERIFY_LEN  # what is behind it means nothing
    return relative_error(got[..., :context], it.sketch.scores[..., :context])


def _attention(bench: Bench, it: Search, shape: str, fraction: float, paid: dict[str, Row], dense: Row | None) -> None:
    heads, batch = it.heads, it.batch
    attention = bench.measure(
        "sketch", f"sparse_attention, {fraction:.0%}", shape, it.attention_calls,
        shapes.sparse_bytes(heads, batch, VERIFY_LEN, bench.element, it.kept_tokens(), heads.kv), dense,
        check=partial(_check_attention, it), bits=BITS, kept=fraction, kept_tokens=it.kept_tokens(),
    )  # fmt: skip
    parts = [paid[name] for name in SEARCH]
    bench.add_up("sketch", f"search of a layer, {fraction:.0%}", shape, parts, dense, kept=fraction)
    bench.add_up(
        "sketch", f"search and attention of a layer, {fraction:.0%}", shape, [*parts, attention], dense, kept=fraction
    )


def _check_attention(it: Search) -> float:
    """The first request of the last layer against the reference."""
    from specattn_vllm.kernels import reference

    req = it.req
    table, kept = it.select(len(it.layers) - 1)
    req.out.fill_(torch.nan)
    it.operations.sparse_attention(
        req.query, it.caches[-1], table, kept, req.query_start_loc, it.scale, req.out, VERIFY_LEN
    )
    wanted = torch.empty_like(req.out[:VERIFY_LEN])
    reference.sparse_attention(
        req.query[:VERIFY_LEN], it.caches[-1], table[:1], kept[:1], req.query_start_loc[:2], it.scale, wanted,
        VERIFY_LEN,
    )  # fmt: skip
    return relative_error(req.out[:VERIFY_LEN], wanted)
