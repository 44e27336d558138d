"""Method `sketch`: layers of a batch as an engine has them, and what they hand to each kernel of their search.

A layer (`specattn_vllm/sketch/layer.py`) is run, and what it calls is what is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from specattn_vllm.bench.kernels.inputs import BLOCK_SIZE, VERIFY_LEN, Setup
from specattn_vllm.kernels.sketch.layout import SketchLayout
from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.selection.own_choice import ChoiceBatch, ChoiceStep, NewEntries
from specattn_vllm.sketch.budget import budget_of
from specattn_vllm.sketch.layer import LayerSketch
from specattn_vllm.sketch.step import Shape, Sketch
from specattn_vllm.stats import Counters

BITS, KEPT = 2, 0.08
KEYS_AT_A_TIME = 1 << 16


class Search:
    """Layers with sketched caches, and what they share."""

    def __init__(self, setup: Setup) -> None:
        heads, rows, device = setup.target, setup.rows, setup.device
        self.heads, self.operations = heads, setup.operations
        self.searched = setup.context - VERIFY_LEN
        """Tokens of a request that are searched: all but the step's own."""
        self.layout = SketchLayout(heads.kv, BLOCK_SIZE, heads.size, BITS, setup.dtype.itemsize)
        self.caches = setup.make_layers(heads, self.layout.tail_bytes // setup.dtype.itemsize)
        self.req = setup.requests(heads, VERIFY_LEN)
        self.scale = heads.size**-0.5
        # A context that a test can afford has to be searched too, not read whole.
        least = {"min_tokens": min(128, setup.context // 32), "recent_tokens": min(64, setup.context // 32)}
        options = {"method": "sketch", "sketch_bits": BITS, "ratio": setup.kept or KEPT, **least}
        shape = Shape(
            layers=len(self.caches),
            num_heads=heads.query,
            num_kv_heads=heads.kv,
            head_size=heads.size,
            dtype=setup.dtype,
            element_size=setup.dtype.itemsize,
            max_query_len=VERIFY_LEN,
            max_num_reqs=rows,
            max_model_len=-(-setup.context // 64) * 64,
        )
        parsed = SpecAttnOptions.parse(options)
        budget = budget_of(parsed, parsed.shared_budget)
        self.sketch = Sketch(self.operations, budget, BITS, shape, Counters(device), device)
        self.sketch.dense.zero_()
        self.sketch.slots.copy_(torch.arange(rows))
        self.step = ChoiceStep(rows, rows * VERIFY_LEN, VERIFY_LEN)
        self.layers = [LayerSketch(self.sketch, index) for index in range(len(self.caches))]
        for layer, cache in zip(self.layers, self.caches, strict=True):
            for part, first in zip(cache.split(KEYS_AT_A_TIME // BLOCK_SIZE), range(0, len(cache), 4096), strict=True):
                slots = torch.arange(part.shape[0] * BLOCK_SIZE, device=device) + first * BLOCK_SIZE
                entries = part.transpose(1, 2).flatten(0, 1)
                layer.write(NewEntries(entries[..., : heads.size], entries[..., heads.size :], cache, slots))
        # The second step is as all of a request's but the first, which finds no threshold carried over.
        for _ in range(2):
            for index in range(len(self.layers)):
                self.select(index)

    @property
    def kept(self) -> int:
        """Entries of a head on average, by the budget."""
        least = max((self.searched * self.sketch.budget.fixed_ratio + 65535) >> 16, self.sketch.budget.min_tokens)
        return min(least, self.searched) + VERIFY_LEN

    def select(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What a layer chooses: page table [R, H, width] and kept [R, H], int32."""
        req = self.req
        return self.layers[index].select(
            self.step,
            ChoiceBatch(req.query, self.caches[index], req.block_table, req.seq_lens, req.query_start_loc, self.scale),
        )

    def calls_of(self, name: str) -> list[Callable[[], None]]:
        """The calls of one kernel, a layer's each, after what comes before it in the layer."""
        calls: list[Callable[[], None]] = []
        kernel = getattr(self.operations, name)

        def recorded(*arguments) -> None:
            calls.append(partial(kernel, *arguments))
            kernel(*arguments)

        self.sketch.operations = replace(self.operations, **{name: recorded})
        for index in range(len(self.layers)):
            self.select(index)
        self.sketch.operations = self.operations
        return calls

    def encode_calls(self) -> list[Callable[[], None]]:
        """The new keys and values of a step into each layer's cache, and the keys into its sketch."""
        shape = (2, self.step.num_tokens, self.heads.kv, self.heads.size)
        key, value = torch.randn(shape, device=self.req.query.device).to(self.req.query.dtype)
        new = self.searched + torch.arange(VERIFY_LEN, device=key.device)
        slots = (self.req.block_table[:, new // BLOCK_SIZE].long() * BLOCK_SIZE + new % BLOCK_SIZE).flatten()
        layers = zip(self.layers, self.caches, strict=True)
        return [partial(layer.write, NewEntries(key, value, cache, slots)) for layer, cache in layers]
