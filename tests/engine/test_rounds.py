"""A round on inputs that last, as CUDA graphs replay it. Without a GPU the same calls run eagerly on those buffers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from specattn_vllm.speculation.graphs import RoundInputs
from specattn_vllm.speculation.rounds import GRAPHS, RoundSpeculator

pytestmark = pytest.mark.engine


class Replays:
    """Stands in for `RoundGraphs`: 'replaying' runs the round that would have been captured."""

    def __init__(self, speculator: RoundSpeculator, sizes: tuple[int, ...], recording: bool) -> None:
        self.inputs = RoundInputs(speculator.max_num_reqs, speculator.num_speculative_steps + 1, speculator.device)
        # Made beforehand, as at capture: from then on only `load` puts anything into the buffers.
        self.batches = {rows: self.inputs.batch(rows) for rows in sizes}
        self.inputs.clear()
        self.run = speculator._captured(self.inputs, recording)
        self.padding: list[int] = []

    def find(self, batch):
        query_len = self.inputs.query_len
        fits = [rows for rows in self.batches if rows >= batch.num_reqs]
        if not fits or (batch.num_scheduled_tokens != query_len).any():
            return None
        self.padding.append(fits[0] - batch.num_reqs)
        return SimpleNamespace(num_reqs=fits[0])

    def run_fullgraph(self, desc):
        self.run(self.batches[desc.num_reqs])


@pytest.fixture
def replays(monkeypatch):
    """replays(sizes): engines made after it draft through `Replays`, which are put in the list that it returns."""
    made: list[Replays] = []
    set_attn = RoundSpeculator.set_attn

    def use(*sizes: int) -> list[Replays]:
        def with_replays(self, *args, **kwargs):
            set_attn(self, *args, **kwargs)
            for recording in self._kinds():
                made.append(Replays(self, sizes, recording))
                setattr(self, GRAPHS[recording], made[-1])

        monkeypatch.setattr(RoundSpeculator, "set_attn", with_replays)
        return made

    return use


LENGTHS = [40, 700, 333, 1200, 128]
NEW_TOKENS = 24


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"method": "dense"}, id="dense"),
        pytest.param({"top_p": 0.8}, id="specattn"),
        pytest.param({"top_p": 0.8, "combine": "union"}, id="union"),
        pytest.param({"ratio": 0.2, "min_tokens": 32}, id="ratio"),
    ],
)
def test_replayed_rounds_give_the_tokens_and_selections_of_upstream_s(
    options, engine, greedy, prompts, counts, replays
):
    llm = engine(options)
    expected, upstream = greedy(llm, prompts(LENGTHS), NEW_TOKENS), counts(llm)
    # 5 requests in a graph of 6 rows, fewer in one of 3 once some are done.
    made = replays(3, 6)
    llm = engine(options)
    assert greedy(llm, prompts(LENGTHS), NEW_TOKENS) == expected
    assert counts(llm) == upstream
    replayed = [padding for graphs in made for padding in graphs.padding]
    assert len(replayed) > 5
    assert 1 in replayed


def test_selections_of_replayed_rounds_belong_to_their_requests(engine, greedy, prompts, audit, replays):
    made = replays(2, 4, 8)
    llm = engine({"top_p": 0.8}, max_num_seqs=8)
    greedy(llm, prompts([900, 40, 600, 30, 1200, 250, 500, 90, 333, 420]), 20)
    assert len(audit.sparse_rows) == 10
    assert any(made[0].padding)
    # A padded row stores nothing anywhere but in the slot that is nobody's.
    assert not audit.violations


def test_replayed_rounds_select_nothing_for_exact_requests(engine, prompts, audit, replays):
    from vllm import SamplingParams

    replays(2, 4, 8)
    llm = engine({"top_p": 0.8})
    exact = SamplingParams(max_tokens=20, ignore_eos=True, detokenize=False, extra_args={"specattn": "exact"})
    other = SamplingParams(max_tokens=20, ignore_eos=True, detokenize=False)
    llm.generate(prompts([900, 700, 500]), [exact, other, exact], use_tqdm=False)
    assert {name.split("-")[0] for name in audit.sparse_rows} == {"1"}
    assert {name.split("-")[0] for name in audit.dense_rows} == {"0", "2"}


def test_below_the_crossover_everything_is_read(engine, greedy, prompts, counts, audit):
    llm = engine({"top_p": 0.8, "crossover_tokens": 2000})
    greedy(llm, prompts([900]), 12)
    alone = counts(llm)
    assert alone.sparse_rows == 0
    assert audit.sparse_rows == {}
    assert alone.small_batch_rows == alone.no_selection_rows == alone.verify_rows > 0
    greedy(llm, prompts([900, 800, 700, 600]), 12)
    seen = counts(llm)
    assert 0 < seen.sparse_rows < seen.verify_rows
    assert seen.unselected_rows == 0
