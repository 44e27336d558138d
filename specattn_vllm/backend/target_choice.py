"""Joins a method whose target chooses for itself to a model that vLLM has just loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from specattn_vllm import compat
from specattn_vllm.backend.audits import prepare_audit
from specattn_vllm.executors import Operations
from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.reporter import Reporter
from specattn_vllm.request import asks_for_exactness
from specattn_vllm.selection.audit import Audit
from specattn_vllm.selection.own_choice import ChoiceStep, Chooser, LayerChoice, measure
from specattn_vllm.speculation.counting import count_round
from specattn_vllm.stats import Counters

logger = init_logger("vllm.specattn")


class TargetChoice:
    """For a target that chooses for itself: decides which rows of each step choose, and counts steps."""

    def __init__(self, chooser: Chooser, crossover: int, max_num_reqs: int) -> None:
        self.chooser = chooser
        self.crossover = crossover
        self.exact = np.zeros(max_num_reqs, dtype=bool)
        self.dummy = False
        """Whether the current step is one of vLLM's warm-up steps."""
        self.captured: bool | None = None
        """While vLLM captures CUDA graphs: whether rows choose in the captured steps. None at other times."""
        self.chooses = True
        """Whether any row of the current step chooses. If none does, nothing is searched."""
        self.reporter: Reporter | None = None
        """Set if no speculator of ours reports."""
        self.audit: Audit | None = None
        self._announced: tuple[tuple[Any, ...], ChoiceStep | None] = (), None
        """The last announced step: the tensors that its metadata has in all groups, and the resulting `ChoiceStep`."""

    def enter(self, slot: int, request: Any) -> None:
        """A new or resumed request gets a slot."""
        self.exact[slot] = asks_for_exactness(request.sampling_params)
        self.chooser.forget(slot)

    def reset(self) -> None:
        """Count from zero: steps until now were vLLM's own."""
        self.chooser.counts.discard()
        self.chooser.counts.counters.reset()
        if self.audit is not None:
            self.audit.reset()

    def fold(self) -> None:
        """Count the last step, which is otherwise counted when the next step begins."""
        self.chooser.counts.fold()
        if self.audit is not None:
            self.audit.fold()

    def begin(self, common: Any) -> ChoiceStep | None:
        """Begin a step of the target. common: vLLM's common metadata, on the host except for seq_lens and
        query_start_loc.

        If the target's layers are in several groups, each group's builder announces the same step. Only the first call
        begins it, because beginning a step also counts the step before."""
        # vLLM makes new tensors for each step and gives the same ones to all groups. Holding references to them here
        # ensures that a new step cannot reuse their identities.
        shared = common.query_start_loc_cpu, common.seq_lens, common.req_idx
        announced, step = self._announced
        if not announced or any(new is not old for new, old in zip(shared, announced, strict=True)):
            step = self._begin(common)
            self._announced = shared, step
        return step

    def _begin(self, common: Any) -> ChoiceStep | None:
        rows = common.num_reqs
        starts = common.query_start_loc_cpu[: rows + 1]
        short, *_ = self.chooser.short_rows(starts)
        # The batch of a full CUDA graph has padded rows, which have no tokens to read.
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
            # Count the step before; do not count this one.
            self.chooser.counts.fold()
        else:
            lengths = (starts[1 : short + 1] - starts[:short]).numpy()
            verifies = ~prefilling & (lengths > 0)
            prompts = int(common.is_prefilling.sum())
            device = common.seq_lens[:short], common.query_start_loc[: short + 1]
            self.chooser.counts.begin(short, verifies, exact, small, prompts, *device, self.chooses)
            if self.reporter is not None:
                self.reporter.tick()
        step = self.chooser.begin(dense, slots, starts) if self.chooses else None
        if self.audit is not None:
            self.audit.fold()
            if step is not None and not self.dummy:
                lens, firsts = common.seq_lens[:short], common.query_start_loc[: short + 1]
                usable = torch.where(self.chooser.choose_among(lens, firsts), 0, -1)
                self.audit.choose(self.chooser.slots[:short].long(), usable, firsts[:short], lens)
        return step

    def _too_small(self, common: Any, real: int) -> bool:
        if not self.crossover or not real:
            return False
        lens = common.seq_lens_cpu_upper_bound
        total = int(lens[:real].sum()) if lens is not None else real * common.max_seq_len
        return total < self.crossover


def target_layers(runner: Any) -> dict[str, Any]:
    """The attention layers of the model runner's target that are ours, keyed by vLLM's names, in order. Layers with a
    sliding window are vLLM's own. Raises ValueError if there is none."""
    drafters = getattr(runner.speculator, "draft_attn_layer_names", None) or set()
    layers = get_layers_from_vllm_config(runner.vllm_config, AttentionLayerBase)
    found = {name: layer for name, layer in layers.items() if name not in drafters and compat.is_our_layer(layer)}
    if not found:
        raise ValueError("no layer of the target sees all of the context: serve this model with vLLM's own backends")
    return found


def counters_of(runner: Any) -> Counters:
    """The counters for the model runner's target: those of our speculator, which reports them, or new ones."""
    return getattr(runner.speculator, "counters", None) or Counters(runner.device)


def join(
    runner: Any, options: SpecAttnOptions, operations: Operations, chooser: Chooser, choices: Mapping[str, LayerChoice]
) -> TargetChoice:
    """Give the target's layers their choices (keyed by vLLM's names), and announce each step to the chooser.

    The function that `Method.attach` names calls this, when vLLM's model runner has loaded its models."""
    target = TargetChoice(chooser, options.crossover(operations.name), runner.max_num_reqs)
    layers = target_layers(runner)
    counters = chooser.counts.counters
    measure([*choices.values()], operations, counters.on_device("selection_ns"))
    for name, choice in choices.items():
        layers[name].impl.choice = choice
        layers[name].impl.target_choice = target
    if getattr(runner.speculator, "reporter", None) is None:
        first = runner.vllm_config.parallel_config.rank == 0
        target.reporter = Reporter(counters, options.stats_interval_s, logs=first)
        runner.specattn_reporter = target.reporter
        compat.count_rounds(runner, lambda batch, sampled: count_round(counters, operations, batch, sampled))
    reporter = target.reporter or runner.speculator.reporter
    sought = {name: layers[name] for name in choices}
    audit = prepare_audit(options, sought, operations, counters, reporter, runner.max_num_reqs, runner.device)
    target.audit = runner.specattn_audit = audit
    compat.watch_new_requests(runner.model_state, "target", target.enter)

    def reset() -> None:
        target.reset()
        reporter.reset()

    compat.at_first_request(runner.model_state, reset)
    compat.mark_dummy_runs(runner, target)
    compat.capture_twice(runner.model, target)
    runner.specattn_chooser, runner.specattn_target = chooser, target
    logger.warning(
        "specattn: method '%s' is APPROXIMATE: the target reads a selection of the KV cache, so the output is not the "
        "target model's own. For exact attention set method='dense'.",
        options.method,
    )
    return target
