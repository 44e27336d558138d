"""Joins the sketch to a model that vLLM has just loaded: before it measures what is left for the KV cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from specattn_vllm import compat, executors
from specattn_vllm.crossover import crossover_tokens
from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.request import asks_for_exactness
from specattn_vllm.sketch.budget import budget_of
from specattn_vllm.sketch.centre import measure_centres
from specattn_vllm.sketch.layer import LayerSketch
from specattn_vllm.sketch.step import Shape, Sketch, SketchStep
from specattn_vllm.speculation.announce import sizes
from specattn_vllm.speculation.counting import count_round, watch_drafter
from specattn_vllm.speculation.wiring import refuse_if_too_large, row_width
from specattn_vllm.stats import Counters, Reporter

logger = init_logger("vllm.specattn")

SHARED = {"layers": ", shared out over all layers' heads", "heads": ", shared out over a layer's heads", "none": ""}


class TargetSketch:
    """The sketch of an engine's target: which rows of a step choose, and what was counted."""

    def __init__(self, sketch: Sketch, crossover: int, max_num_reqs: int) -> None:
        self.sketch = sketch
        self.crossover = crossover
        self.exact = np.zeros(max_num_reqs, dtype=bool)
        self.dummy = False
        """Whether the step at hand is one of vLLM's own, for warming up."""
        self.captured: bool | None = None
        """While vLLM captures its graphs: whether rows choose in the steps that are captured. None at other times."""
        self.chooses = True
        """Whether any row of the step at hand chooses. Where none does, nothing is searched."""
        self.reporter: Reporter | None = None
        """Set where no speculator of ours reports."""
        self._served = False
        self._announced: tuple[tuple[Any, ...], SketchStep | None] = (), None
        """The step that was announced last: what its metadata of all layers has in common, and what came of it."""

    def enter(self, slot: int, request: Any) -> None:
        """A request, new or resumed, is given a slot."""
        if not self._served and not compat.is_warm_up(request):
            # What was counted so far, nobody asked for.
            self._served = True
            self.sketch.counts.discard()
            self.sketch.counts.counters.reset()
        self.exact[slot] = asks_for_exactness(request.sampling_params)
        self.sketch.forget(slot)

    def begin(self, common: Any) -> SketchStep | None:
        """A step of the target, from vLLM's common metadata: on the host but for seq_lens and query_start_loc.

        Where the target's layers are in several groups, each group's builder announces the same step. It begins once,
        whoever comes first: counting the step before ends with it, and what a layer chose is not known yet."""
        # vLLM makes these anew for each step, and hands the same ones to all groups. Held here, they are no others.
        shared = common.query_start_loc_cpu, common.seq_lens, common.req_idx
        announced, step = self._announced
        if not announced or any(new is not old for new, old in zip(shared, announced, strict=True)):
            step = self._begin(common)
            self._announced = shared, step
        return step

    def _begin(self, common: Any) -> SketchStep | None:
        rows = common.num_reqs
        starts = common.query_start_loc_cpu[: rows + 1]
        short = self.sketch.short_rows(starts)
        # A full graph's batch has more rows than requests; the rest has no tokens to read.
        real = min(len(common.req_idx), short)
        prefilling, exact = np.ones(short, dtype=bool), np.zeros(short, dtype=bool)
        prefilling[:real] = common.is_prefilling[:real].numpy()
        exact[:real] = self.exact[common.req_idx[:real]]
        slots = np.full(short, -1, dtype=np.int32)
        if not self.dummy:
            slots[:real] = common.req_idx[:real]
        small = self._too_small(common, real)
        dense = prefilling | exact | small
        self.chooses = not dense.all() if self.captured is None else self.captured
        if self.dummy:
            self.sketch.counts.discard()
        else:
            lengths = (starts[1 : short + 1] - starts[:short]).numpy()
            verifies = ~prefilling & (lengths > 0)
            prompts = int(common.is_prefilling.sum())
            device = common.seq_lens[:short], common.query_start_loc[: short + 1]
            self.sketch.counts.begin(short, verifies, exact, small, prompts, *device, self.chooses)
            if self.reporter is not None:
                self.reporter.tick()
        return self.sketch.begin(dense, slots, starts) if self.chooses else None

    def _too_small(self, common: Any, real: int) -> bool:
        if not self.crossover or not real:
            return False
        lens = common.seq_lens_cpu_upper_bound
        total = int(lens[:real].sum()) if lens is not None else real * common.max_seq_len
        return total < self.crossover


def attach(runner: Any) -> None:
    """Called with vLLM's model runner once its model and its drafter are loaded."""
    vllm_config = runner.vllm_config
    options = SpecAttnOptions.from_vllm(vllm_config)
    if not options.uses_sketch:
        watch_drafter(runner, options)
        return
    drafter = runner.speculator
    drafters = getattr(drafter, "draft_attn_layer_names", None) or set()
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    names = [name for name in layers if name not in drafters]
    operations = executors.of_engine(options, runner.device, vllm_config.model_config.dtype)
    # A speculator of ours counts already.
    counters = getattr(drafter, "counters", None) or Counters(runner.device)
    impl = layers[names[0]].impl
    shape = Shape(
        layers=len(names),
        num_heads=impl.num_heads,
        num_kv_heads=impl.num_kv_heads,
        head_size=impl.head_size,
        dtype=vllm_config.model_config.dtype,
        max_query_len=runner.decode_query_len,
        max_num_reqs=runner.max_num_reqs,
        max_model_len=row_width(runner.max_model_len),
    )
    budget = budget_of(options)
    make = lambda device: Sketch(operations, budget, options.sketch_bits, shape, counters, device)  # noqa: E731
    nbytes = make(torch.device("meta")).nbytes
    refuse_if_too_large(nbytes, runner)
    sketch = make(runner.device)
    target = TargetSketch(sketch, crossover_tokens(options, operations), runner.max_num_reqs)
    for index, name in enumerate(names):
        layers[name].impl.sketch = LayerSketch(sketch, index)
        layers[name].impl.target_sketch = target
    measure_centres(
        runner.model,
        [layers[name].impl.sketch for name in names],
        vllm_config,
        vllm_config.model_config.get_vocab_size(),
        runner.device,
    )
    if getattr(drafter, "reporter", None) is None:
        target.reporter = Reporter(counters, options.stats_interval_s)
        compat.count_rounds(runner, lambda batch, sampled: count_round(counters, operations, batch, sampled))
    compat.watch_new_requests(runner.model_state, target.enter)
    compat.mark_dummy_runs(runner, target)
    compat.capture_twice(runner.model, target)
    runner.specattn_sketch = sketch
    _announce(options, target, nbytes, vllm_config)


def _announce(options: SpecAttnOptions, target: TargetSketch, nbytes: dict[str, int], vllm_config: Any) -> None:
    sketch, budget = target.sketch, target.sketch.budget
    logger.warning(
        "specattn: method 'sketch' is APPROXIMATE: the target reads a selection of the KV cache, so the output is not "
        "the target model's own. For exact attention set method='dense'."
    )
    layout = sketch.layout
    logger.info(
        "specattn: each KV head reads %s%s, chosen by the step's own queries over a %d-bit copy of the keys, which "
        "adds %.1f%% to the KV cache; executor=%s, buffers %.1f MiB (%s)",
        budget.amount,
        SHARED[budget.shared] if budget.top_p is None else "",
        options.sketch_bits,
        100 * layout.tail_bytes / layout.page_bytes,
        sketch.operations.label or sketch.operations.name,
        sum(nbytes.values()) / 2**20,
        sizes(nbytes),
    )
    if target.crossover:
        logger.info(
            "specattn: batches of fewer than %d context tokens read everything, in graphs of their own",
            target.crossover,
        )
    spec = vllm_config.speculative_config
    logger.info("specattn: drafting: %s", "none" if spec is None else f"vLLM's {spec.method}, unchanged")
