"""What a step of the target is told, and what is counted, whichever of its builders announces it. No engine starts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
from specattn_vllm import executors
from specattn_vllm.backend.builder import SpecAttnMetadataBuilder
from specattn_vllm.backend.target_choice import TargetChoice
from specattn_vllm.kernels.sketch.contracts import Budget
from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.sketch import attach
from specattn_vllm.sketch.step import Shape, Sketch
from specattn_vllm.stats import Counters

CPU = torch.device("cpu")
SHAPE = Shape(
    layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_size=64,
    dtype=torch.float32,
    element_size=4,
    max_query_len=5,
    max_num_reqs=4,
    max_model_len=512,
)


@pytest.fixture
def target() -> TargetChoice:
    sketch = Sketch(executors.resolve("torch", CPU), Budget(0.25, min_tokens=64), 2, SHAPE, Counters(CPU), CPU)
    return TargetChoice(sketch, 0, SHAPE.max_num_reqs)


@pytest.fixture
def announce(target):
    """announce(lens, query_lens, prefilling, groups) -> what the builders of so many groups hand to their layers."""
    builders = []
    for _ in range(3):
        made = object.__new__(SpecAttnMetadataBuilder)
        made.device, made.pruner, made.target_capture, made.target_choice = CPU, None, None, target
        builders.append(made)

    def run(lens: list[int], query_lens: list[int], prefilling: list[bool], groups: int = 3) -> list:
        starts = torch.tensor([0, *query_lens]).cumsum(0).int()
        shared = {
            "num_reqs": len(lens),
            "num_actual_tokens": sum(query_lens),
            "max_query_len": max(query_lens),
            "max_seq_len": max(lens),
            "query_start_loc": starts,
            "query_start_loc_cpu": starts.clone(),
            "seq_lens": torch.tensor(lens, dtype=torch.int32),
            "seq_lens_cpu_upper_bound": None,
            "req_idx": np.arange(len(lens)),
            "is_prefilling": torch.tensor(prefilling),
        }
        # A group's metadata is an object of its own, with a table of its own blocks.
        tables = torch.arange(groups * len(lens) * 32, dtype=torch.int32).view(groups, len(lens), 32)
        return [
            builder.build(0, SimpleNamespace(**shared, block_table_tensor=table)).choice
            for builder, table in zip(builders, tables, strict=False)
        ]

    return run


@pytest.mark.parametrize("groups", [1, 3])
def test_a_step_is_counted_once_whoever_announces_it(announce, target, groups):
    first = announce([300, 200], [5, 100], [False, True], groups)
    assert all(step is first[0] for step in first)
    assert (first[0].num_rows, first[0].num_tokens) == (1, 5)
    # What the layers chose becomes known as they run, after all builders.
    target.chooser.kept[:, :1] = 80
    announce([305, 201], [5, 1], [False, False], groups)
    target.chooser.kept[:, :2] = 90
    target.chooser.counts.fold()
    seen = target.chooser.counts.counters.read()
    heads = SHAPE.layers * SHAPE.num_kv_heads
    assert seen.prefill_rows == 1
    assert seen.verify_rows == seen.sparse_rows == 3
    assert seen.kv_full == (300 + 305 + 201) * heads
    assert seen.kv_read == (80 + 90 + 90) * heads
    assert seen.kv_scanned == (295 + 300 + 200) * heads
    # Contexts of less than 512 tokens are sampled whole.
    assert seen.kv_sampled == seen.kv_scanned


def test_steps_that_look_alike_are_two(announce, target):
    for _ in range(2):
        announce([300], [5], [False])
        target.chooser.kept[:, :1] = 80
    target.chooser.counts.fold()
    assert target.chooser.counts.counters.read().verify_rows == 2


def test_a_step_in_which_no_row_chooses_is_searched_by_none(announce, target):
    target.crossover = 601
    for lens, chooses in (([300, 200], False), ([400, 205], True)):
        steps = announce(lens, [5, 5], [False, False])
        assert target.chooses == chooses
        assert all((step is not None) == chooses for step in steps)
        target.chooser.kept[:, :2] = 80
    target.exact[:2] = True
    assert announce([500, 205], [5, 5], [False, False]) == [None] * 3
    announce([500, 205], [5, 5], [True, False])
    assert not target.chooses, "a prompt beside an exact request"
    before = target.chooser.counts.counters.read()
    assert before.verify_rows - before.sparse_rows == before.small_batch_rows + before.exact_rows, "half of a step"
    target.chooser.counts.fold()
    seen, heads = target.chooser.counts.counters.read(), SHAPE.layers * SHAPE.num_kv_heads
    assert (seen.small_batch_rows, seen.exact_rows) == (2, 3)
    assert seen.kv_full == (500 + 605 + 705 + 205) * heads
    assert seen.kv_read == (500 + 80 * 2 + 705 + 205) * heads
    assert seen.sparse_rows == 2


def test_a_slot_keeps_nothing_for_who_gets_it_next(target):
    target.chooser.totals.fill_(3)
    target.exact[:] = True
    target.enter(1, SimpleNamespace(sampling_params=None))
    assert target.exact.tolist() == [True, False, True, True]
    assert target.chooser.totals.amax(1).tolist() == [3, 0, 3, 3, 3]
    assert target.chooser.totals.amin(1).tolist() == [3, 0, 3, 3, 3]


def test_rows_that_read_everything_are_told_to_the_layers(announce, target):
    """Of short rows: one inside its prompt, and one that asked for exactness."""
    target.exact[2] = True
    [step] = announce([300, 200, 400], [5, 3, 5], [False, True, False], groups=1)
    assert step.num_rows == 3 and target.chooser.dense[:3].tolist() == [0, 1, 1]
    assert target.chooser.slots[:3].tolist() == [0, 1, 2]


def test_a_dummy_step_names_no_slot(announce, target):
    """vLLM's made-up requests have the slots of real ones, whose budgets they would change."""
    target.dummy = True
    announce([300, 200], [5, 5], [False, False])
    assert target.chooser.slots.tolist() == [-1] * SHAPE.max_num_reqs


@pytest.mark.parametrize("captured", [True, False])
def test_what_is_captured_is_not_for_the_batch_to_say(announce, target, captured):
    """vLLM captures with lengths of its own choice."""
    target.crossover, target.captured, target.dummy = 10**6, captured, True
    assert [step is not None for step in announce([300], [5], [False])] == [captured] * 3
    target.crossover, target.captured = 0, None
    assert None not in announce([300], [5], [False])


def test_graphs_are_captured_with_and_without_the_search(monkeypatch):
    """vLLM's manager stands in for itself: what is captured is what the target said while it was."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

    from specattn_vllm import compat

    full, piecewise = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE

    def capture(self, model, sizes):
        for mode, descs in self._capture_descs.items():
            for desc in descs[:sizes]:
                self.seen.append((mode.name, desc, target.captured))
                self.graphs[desc] = f"{desc} {target.captured}"
                if self._capture_mem_samples is not None:
                    self._capture_mem_samples.append(100 if target.captured else 10)

    monkeypatch.setattr(ModelCudaGraphManager, "capture", capture)
    monkeypatch.setattr(ModelCudaGraphManager, "run_fullgraph", lambda self, desc: self.graphs[desc])
    target, model = SimpleNamespace(captured=None, chooses=True), SimpleNamespace()
    for _ in range(2):  # a second engine of the process wraps nothing again
        compat.capture_twice(model, target)

    def manager(samples):
        made = object.__new__(ModelCudaGraphManager)
        made.graphs, made.seen, made._capture_mem_samples = {}, [], samples
        made._capture_descs = {piecewise: [8], full: [4, 2]}
        return made

    ours = manager(samples := [])
    ours._capture_descs = {full: [4, 2]}
    ours.capture(model, 2)
    assert samples == [110, 2 << 20], "a MiB at least for each, as vLLM reckons"
    ours = manager(None)
    ours.capture(model, 2)
    assert ours.seen == [
        ("PIECEWISE", 8, True),
        ("FULL", 4, True),
        ("FULL", 2, True),
        ("FULL", 4, False),
        ("FULL", 2, False),
    ]
    assert ours._capture_descs.keys() == {piecewise, full}
    assert target.captured is None
    assert ours.run_fullgraph(4) == "4 True"
    target.chooses = False
    assert (ours.run_fullgraph(4), ours.run_fullgraph(2)) == ("4 False", "2 False")
    assert ours.graphs[4] == "4 True"
    stock = manager(None)
    stock.capture(SimpleNamespace(), 1)
    assert stock.run_fullgraph(4) == "4 None"


def test_the_log_line_is_due_once_a_step(announce, target):
    ticks = []
    target.reporter = SimpleNamespace(tick=lambda: ticks.append(1))
    announce([300], [5], [False])
    announce([301], [1], [False])
    assert len(ticks) == 2


@pytest.mark.parametrize(
    ("spec", "options", "said"),
    [
        (None, {}, "none"),
        (SimpleNamespace(method="eagle", uses_draft_model=lambda: False), {}, "vLLM's eagle, unchanged"),
        (SimpleNamespace(uses_draft_model=lambda: True, method="draft_model"), {}, "a draft model, which reads a part"),
        (
            SimpleNamespace(uses_draft_model=lambda: True, method="draft_model"),
            {"sparse_draft": False},
            "a draft model, which reads everything",
        ),
    ],
)
def test_the_log_says_who_drafts(target, monkeypatch, spec, options, said):
    told = []
    monkeypatch.setattr(attach.logger, "info", lambda message, *args: told.append(message % args))
    config = SimpleNamespace(speculative_config=spec)
    attach._announce(SpecAttnOptions.parse(options), target.chooser, 0, config)
    assert told[-1] == f"specattn: drafting: {said}"
