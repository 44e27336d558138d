"""The speculator: which rounds leave a selection behind, and which are replayed from a graph. No model is run."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
from specattn_vllm import compat, executors
from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.selection.store import SelectionStore
from specattn_vllm.speculation.speculator import SpecAttnSpeculator
from specattn_vllm.stats import Counters, Counts

CPU = torch.device("cpu")
REQUESTS, STEPS = 4, 2


class Graphs:
    """Graphs of two rows; says what was replayed."""

    def __init__(self, found: bool = True) -> None:
        self.found, self.loaded, self.replayed, self.inputs = found, [], [], self

    def find(self, batch):
        return SimpleNamespace(num_reqs=2) if self.found else None

    def load(self, batch, rows, *tensors):
        self.loaded.append((batch, rows, *tensors))

    def run_fullgraph(self, desc):
        self.replayed.append(desc.num_reqs)


@pytest.fixture
def speculator(monkeypatch):
    """A speculator that has selections for slots 0 to 3, and whose rounds only say whether they were recorded."""
    made = object.__new__(SpecAttnSpeculator)
    store = SelectionStore(1, REQUESTS, 1, 64, CPU)
    store.prefix_lens[:REQUESTS] = 7
    made.selection = SimpleNamespace(store=store, capture=None, pruner=object())
    made.options = SpecAttnOptions.parse({"method": "specattn"})
    made.crossover_tokens = 0
    made.audit = None
    made._recording = False
    made.device = CPU
    made.operations = executors.resolve("torch", CPU)
    made.counters = Counters(CPU)
    made.reporter = SimpleNamespace(tick=lambda: None)
    made.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(rank=0))
    made.draft_tokens = torch.arange(REQUESTS * STEPS).view(REQUESTS, STEPS)
    made.rounds = []

    def round_(batch, *args, recording, **kwargs):
        made.rounds.append(recording)
        return "drafts"

    monkeypatch.setattr(made, "_round", round_, raising=False)
    return made


def batch(*lens: int, drafts: list[int] | None = None, prefilling: list[bool] | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        num_reqs=len(lens),
        num_scheduled_tokens=np.full(len(lens), STEPS + 1, dtype=np.int32),
        # Bounds, and longer than the batch where a graph pads it.
        seq_lens_cpu_upper_bound=torch.tensor([*lens, 10**6], dtype=torch.int32),
        idx_mapping=torch.arange(3, 3 - len(lens), -1),
        idx_mapping_np=np.arange(3, 3 - len(lens), -1),
        num_draft_tokens_per_req=None if drafts is None else np.array(drafts, dtype=np.int32),
        is_prefilling_np=np.array(prefilling or [False] * len(lens)),
    )


def propose(speculator, given, num_sampled: list[int] | None = None, **kwargs):
    sampled = torch.tensor(num_sampled or [1] * given.num_reqs, dtype=torch.int32)
    rest = ("attention", "slots", None, None, sampled, "rejected", "last", "next", "temperature", "seeds")
    return speculator.propose(given, *rest, **kwargs)


@pytest.mark.parametrize(("tokens", "recorded"), [(99, True), (100, True), (101, False)])
def test_a_batch_below_the_crossover_leaves_nothing_behind(speculator, tokens, recorded):
    speculator.crossover_tokens = tokens
    assert propose(speculator, batch(60, 40)) == "drafts"
    assert speculator.rounds == [recorded]
    # What it had is forgotten: the next verification reads everything. Others keep theirs.
    assert speculator.selection.store.prefix_lens[:REQUESTS].tolist() == [7, 7, *([7, 7] if recorded else [-1, -1])]
    assert speculator.selection.store.dense_on_purpose(np.arange(REQUESTS)) == (0, 0 if recorded else 2)
    speculator.crossover_tokens = 0
    propose(speculator, batch(60, 40))
    assert speculator.selection.store.dense_on_purpose(np.arange(REQUESTS)) == (0, 0)


def test_without_a_selection_nothing_is_recorded(speculator):
    speculator.selection, speculator.crossover_tokens = None, 10**9
    propose(speculator, batch(60))
    assert speculator.rounds == [False]


def test_a_dummy_batch_leaves_no_trace(speculator):
    """It names slots of real requests, and is smaller than any crossover."""
    speculator.crossover_tokens = 10**9
    speculator.recording_graphs = speculator.plain_graphs = Graphs()
    speculator.counters.stage(verify_rows=5)
    propose(speculator, batch(60, drafts=[2]), dummy_run=True)
    assert speculator.rounds == [False]
    assert speculator.plain_graphs.replayed == []
    assert speculator.selection.store.prefix_lens[:REQUESTS].tolist() == [7] * REQUESTS
    speculator.counters.commit()
    assert speculator.counters.read() == Counts()


@pytest.mark.parametrize(("crossover", "which"), [(0, "recording"), (1000, "plain")])
def test_a_round_with_a_graph_is_replayed(speculator, crossover, which):
    speculator.crossover_tokens = crossover
    graphs = {name: Graphs() for name in ("recording", "plain")}
    for name, made in graphs.items():
        setattr(speculator, f"{name}_graphs", made)
    given = batch(60)
    drafts = propose(speculator, given, num_sampled=[2])
    assert drafts.tolist() == [[0, 1]]
    assert speculator.rounds == []
    assert graphs.pop(which).replayed == [2]
    assert all(other.replayed == other.loaded == [] for other in graphs.values())


def test_a_graph_is_given_the_step_s_inputs(speculator):
    speculator.recording_graphs = Graphs()
    given = batch(60)
    propose(speculator, given, num_sampled=[2])
    [(loaded, rows, sampled, *rest)] = speculator.recording_graphs.loaded
    assert loaded is given and rows == 2 and sampled.tolist() == [2]
    assert rest == ["rejected", "last", "temperature", "seeds"]


def test_a_round_without_a_graph_runs_as_it_is(speculator):
    speculator.recording_graphs = Graphs(found=False)
    assert propose(speculator, batch(60)) == "drafts"
    assert speculator.rounds == [True]
    assert speculator.recording_graphs.replayed == []


@pytest.mark.parametrize(("crossover", "kinds"), [(0, [True]), (9, [True, False])])
def test_an_engine_has_graphs_for_the_kinds_of_its_rounds(speculator, crossover, kinds):
    speculator.crossover_tokens = crossover
    assert speculator._kinds() == kinds
    # A round of a kind that was not captured would find no graph.
    for tokens in (8, 9, 8, 9):
        propose(speculator, batch(tokens))
    assert {*speculator.rounds} == {*kinds}
    speculator.selection = None
    assert speculator._kinds() == [False]


@pytest.mark.parametrize("graph", [False, True])
def test_verified_rows_are_counted_however_the_round_ran(speculator, graph):
    speculator.recording_graphs = Graphs(found=graph)
    speculator.counters.stage(verify_rows=3)
    # The second had no drafts, and those of the third are padding: a token of its prompt is left.
    given = batch(60, 40, 30, drafts=[2, 0, 2], prefilling=[False, False, True])
    propose(speculator, given, num_sampled=[3, 1, 1])
    assert speculator.counters.read() == Counts(rounds=1, sampled_tokens=3, verify_rows=3)


def test_a_batch_that_only_verifies_is_counted_whole(speculator):
    propose(speculator, batch(60, 40, drafts=[2, 1]), num_sampled=[3, 2, 100])
    propose(speculator, batch(60, 40, drafts=[0, 0]), num_sampled=[1, 1])
    propose(speculator, batch(60, 40), num_sampled=[1, 1])
    assert speculator.counters.read() == Counts(rounds=2, sampled_tokens=5)


# One round


class Capture:
    """Says what it was told."""

    def __init__(self, prefix_lens: list[int]) -> None:
        self.told, self.step = [], -1
        self.prefix_lens = torch.tensor(prefix_lens, dtype=torch.int32)

    def begin_round(self, wanted):
        self.told.append(("round", wanted.tolist()))

    def begin_step(self, step, rows, lens):
        self.step = step
        self.told.append(("step", step, *(None if t is None else t.tolist() for t in (rows, lens))))

    def end_step(self):
        self.told.append(("end", self.step))

    def select(self):
        return torch.full((1, len(self.prefix_lens), 1, 2), 5, dtype=torch.int32), self.prefix_lens


@pytest.fixture
def drafting(monkeypatch):
    """A speculator whose upstream runs the steps of a round without a model; fails in the step that `fail` names."""
    made = object.__new__(SpecAttnSpeculator)
    made._recording, made.fail = False, None
    made.selection = SimpleNamespace(
        store=SelectionStore(1, REQUESTS, 1, 64, CPU), capture=Capture([0, 9]), pruner=object()
    )
    made.last_token_indices = torch.tensor([2, 5, 99])
    made.expanded_positions = torch.tensor([10, 11, 12, 7, 8, 9])
    stock = compat.stock_speculator()

    def upstream(self, batch, attn_metadata, slot_mappings, hidden, aux, num_sampled, *args, **kwargs):
        self.layers = []
        for step in (0, 2, 3):  # upstream counts its correction token as a step
            self.layers.append(self._build_attn_metadata(batch.num_reqs, step=step))
            if self.fail == step:
                raise RuntimeError("out of memory")
            self._run_model()
        return "drafts"

    monkeypatch.setattr(stock, "propose", upstream)
    monkeypatch.setattr(stock, "_build_attn_metadata", lambda self, rows, step: {"layer": SimpleNamespace(hook=None)})
    monkeypatch.setattr(stock, "_run_model", lambda self: "hidden states")
    return made


def one_round(speculator, recording: bool):
    sampled = torch.tensor([0, 2, 9], dtype=torch.int32)
    given = SimpleNamespace(num_reqs=2, idx_mapping=torch.tensor([3, 1, -1]))
    return speculator._round(given, {}, {}, None, None, sampled, "rejected", "last", None, 0, 0, recording=recording)


def test_a_recorded_round_tells_the_capture_each_step_and_stores_its_selection(drafting):
    assert one_round(drafting, True) == "drafts"
    capture = drafting.selection.capture
    assert capture.told == [
        ("round", [False, True]),
        ("step", 0, [2, 5], [13, 10]),
        ("end", 0),
        ("step", 1, None, None),
        ("end", 1),
        ("step", 2, None, None),
        ("end", 2),
    ]
    assert all(metadata["layer"].hook is capture for metadata in drafting.layers)
    assert drafting.selection.store.prefix_lens.tolist() == [-1, 9, -1, -1, -1]
    assert drafting.selection.store.bits[0, :, 0, 0].tolist() == [0, 5, 0, 5, 0]
    assert not drafting._recording


def test_a_round_that_is_not_recorded_leaves_the_capture_alone(drafting):
    assert one_round(drafting, False) == "drafts"
    assert drafting.selection.capture.told == []
    assert all(metadata["layer"].hook is None for metadata in drafting.layers)
    assert not drafting.selection.store.bits.any()


@pytest.mark.parametrize("step", [0, 2])
def test_a_round_that_fails_is_over(drafting, step):
    """Nothing of it is stored, and what vLLM runs next is not taken for a part of it."""
    drafting.fail = step
    with pytest.raises(RuntimeError):
        one_round(drafting, True)
    assert not drafting._recording
    assert drafting.selection.store.prefix_lens.tolist() == [-1] * 5
