"""Full CUDA graphs of verification and drafting: the tokens of eager execution, in fp32, and sane ones in bf16."""

from __future__ import annotations

import warnings

import pytest
import torch

pytestmark = [
    pytest.mark.engine,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

# Rows of 5 tokens: graphs of 1, 2, 4 and 8 requests. No compilation, which changes nothing that is tested here.
GRAPHS = {
    "enforce_eager": False,
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [5, 10, 20, 40],
    },
}
LENGTHS = [5, 129, 700, 1300, 2500, 4000]
TOGETHER = [250, 300, 350]
"""Prompts that are read in one step, so that their requests decode side by side from begin to end."""
ACROSS = sum(TOGETHER) + 40
"""A crossover between the first step's tokens and the last one's: graphs of both kinds, in turn."""
NEW_TOKENS = 32


@pytest.fixture
def replayed(monkeypatch):
    """Graphs replayed by engines made after it: {'target': n, 'draft': n}."""
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager, ModelCudaGraphManager

    from specattn_vllm.speculation.graphs import RoundGraphs

    seen = {"target": 0, "draft": 0}
    run = CudaGraphManager.run_fullgraph

    def count(self, desc):
        seen["draft" if isinstance(self, RoundGraphs) else "target"] += 1
        return run(self, desc)

    monkeypatch.setattr(CudaGraphManager, "run_fullgraph", count)
    assert "run_fullgraph" in vars(ModelCudaGraphManager)  # which calls the one above
    return seen


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"method": "dense"}, id="dense"),
        pytest.param({"method": "dense", "sparse_draft": True, "min_tokens": 32}, id="dense-sparse_draft"),
        pytest.param({"top_p": 1.0}, id="top_p=1"),
        pytest.param({"method": "sts", "ratio": 1.0}, id="sts-everything"),
        pytest.param({"method": "vegas", "min_tokens": 32, "crossover_tokens": 0}, id="vegas"),
        pytest.param({"method": "streamingllm", "min_tokens": 32}, id="streamingllm"),
        pytest.param({"top_p": 0.5, "crossover_tokens": 10**6}, id="below-the-crossover"),
    ],
)
def test_exact_modes_equal_plain_decoding(options, engine, greedy, prompts, counts, replayed):
    expected = greedy(engine(None), prompts(LENGTHS), NEW_TOKENS)
    llm = engine(options, **GRAPHS)
    assert greedy(llm, prompts(LENGTHS), NEW_TOKENS) == expected
    assert counts(llm).acceptance_length > 1.5
    assert replayed["target"] > 5
    assert replayed["draft"] > 5


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"top_p": 0.8}, id="specattn"),
        pytest.param({"ratio": 0.2, "min_tokens": 32}, id="ratio"),
        pytest.param({"top_p": 0.8, "combine": "union"}, id="union"),
        pytest.param({"method": "sts", "ratio": 0.3}, id="sts"),
    ],
)
def test_selections_in_graphs_equal_those_of_eager_steps(options, engine, greedy, prompts, counts, replayed):
    eager = engine(options)
    expected, upstream = greedy(eager, prompts(LENGTHS), NEW_TOKENS), counts(eager)
    assert replayed["draft"] == 0
    llm = engine(options, **GRAPHS)
    assert greedy(llm, prompts(LENGTHS), NEW_TOKENS) == expected
    seen = counts(llm)
    assert seen.sparse_rows == seen.verify_rows
    # A logit that rounds the other way moves a token in or out of a selection, no more.
    assert seen.kv_fraction == pytest.approx(upstream.kv_fraction, rel=0.01)
    assert replayed["target"] > 5
    assert replayed["draft"] > 5


@pytest.mark.parametrize(
    "options", [{"top_p": 0.8}, {"method": "sketch", "ratio": 0.2, "min_tokens": 32}], ids=["specattn", "sketch"]
)
def test_audits_in_graphs_find_what_those_of_eager_steps_find(options, engine, greedy, prompts, counts, replayed):
    """A replay that measured the pairs of the step it was captured in would measure none."""
    options = options | {"audit_share": 1.0}
    eager = engine(options)
    greedy(eager, prompts(LENGTHS), NEW_TOKENS)
    [expected] = eager.collective_rpc("specattn_audit")
    llm = engine(options, **GRAPHS)
    greedy(llm, prompts(LENGTHS), NEW_TOKENS)
    [found] = llm.collective_rpc("specattn_audit")
    assert replayed["target"] > 5
    seen = counts(llm)
    assert seen.audited_pairs == sum(layer["pairs"] for layer in found.values())
    assert seen.audited_pairs == seen.sparse_rows * len(found) > 0
    assert found.keys() == expected.keys()
    for layer, numbers in found.items():
        # A round may end a token earlier where two logits are all but equal, and other lengths are audited then.
        assert numbers["retained_mean"] == pytest.approx(expected[layer]["retained_mean"], abs=0.02)
        assert numbers["bound_mean"] == pytest.approx(expected[layer]["bound_mean"], rel=0.1)


def test_a_target_s_own_selections_in_graphs_accept_as_many_drafts(engine, greedy, prompts, counts, replayed):
    """Drafts are only as good as what they read: a table that is off shows in the acceptance alone."""
    options = {"method": "vegas", "min_tokens": 32, "dilation": 5}
    eager = engine(options)
    greedy(eager, prompts(LENGTHS), NEW_TOKENS)
    upstream = counts(eager)
    assert replayed["draft"] == 0
    llm = engine(options, **GRAPHS)
    greedy(llm, prompts(LENGTHS), NEW_TOKENS)
    assert replayed["target"] > 5
    assert replayed["draft"] > 5
    assert counts(llm).acceptance_length == pytest.approx(upstream.acceptance_length, rel=0.03)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"top_p": 0.95}, id="auto"),
        pytest.param({"top_p": 0.95, "executor": "fa3"}, id="fa3"),
        pytest.param({"top_p": 0.95, "executor": "triton"}, id="triton"),
        pytest.param({"method": "sts", "ratio": 0.4}, id="sts"),
    ],
)
def test_bf16_reads_less_and_says_the_same(options, engine, greedy, prompts, counts, replayed):
    """In 16 bits near-ties fall either way, so tokens are compared up to where most agree."""
    expected = greedy(engine(None, dtype="bfloat16"), prompts(LENGTHS), 8)
    llm = engine({"crossover_tokens": 0, **options}, dtype="bfloat16", **GRAPHS)
    tokens = greedy(llm, prompts(LENGTHS), 8)
    same = sum(t == e for row, want in zip(tokens, expected, strict=True) for t, e in zip(row, want, strict=True))
    assert same >= 0.8 * 8 * len(LENGTHS)
    seen = counts(llm)
    assert seen.sparse_rows == seen.verify_rows > 0
    assert seen.kv_fraction < 0.7
    assert replayed["target"] > 0
    assert replayed["draft"] > 0


def test_requests_that_come_and_go_between_graph_sizes(engine, prompts, greedy, counts, replayed):
    lengths = [900, 40, 600, 30, 1200, 250, 500, 90, 333, 420, 77, 1000]
    expected = greedy(engine({"top_p": 0.8}, max_num_seqs=8), prompts(lengths), 24)
    llm = engine({"top_p": 0.8}, max_num_seqs=8, **GRAPHS)
    tokens = greedy(llm, prompts(lengths), 24)
    # One row's selection may differ by a token whose mass is at the threshold.
    assert sum(t == e for t, e in zip(tokens, expected, strict=True)) >= len(lengths) - 1
    seen = counts(llm)
    assert seen.sparse_rows == seen.verify_rows
    assert replayed["target"] > 5
    assert replayed["draft"] > 5


def test_xformers_reads_whole_blocks(engine, greedy, prompts, counts):
    pytest.importorskip("xformers")
    expected = greedy(engine(None, dtype="bfloat16"), prompts(LENGTHS), 8)
    seen = {}
    for executor in ("xformers", "triton"):
        llm = engine({"top_p": 0.9, "executor": executor}, dtype="bfloat16")
        tokens = greedy(llm, prompts(LENGTHS), 8)
        same = sum(t == e for row, want in zip(tokens, expected, strict=True) for t, e in zip(row, want, strict=True))
        assert same >= 0.8 * 8 * len(LENGTHS)
        seen[executor] = counts(llm)
    assert seen["xformers"].sparse_rows == seen["xformers"].verify_rows > 0
    # A block is read for one kept token in it.
    assert seen["triton"].kv_fraction < seen["xformers"].kv_fraction < 1


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"method": "dense"}, id="dense"),
        pytest.param({"top_p": 0.8}, id="specattn"),
        pytest.param({"ratio": 0.2, "min_tokens": 32}, id="ratio"),
        pytest.param({"top_p": 0.8, "audit_share": 0.5}, id="audit"),
        pytest.param({"method": "sketch", "min_tokens": 32, "audit_share": 0.5}, id="sketch-audit"),
        pytest.param({"top_p": 0.8, "crossover_tokens": 10**6}, id="below-the-crossover"),
        pytest.param({"method": "sts", "ratio": 0.3}, id="sts"),
        pytest.param({"method": "vegas", "min_tokens": 32}, id="vegas"),
        pytest.param({"method": "sketch", "sparse_draft": True, "min_tokens": 32}, id="sketch-sparse_draft"),
    ],
)
def test_no_step_waits_for_the_device(options, engine, greedy, prompts, monkeypatch):
    """Async scheduling is only worth something if neither `propose` nor `build` waits. Requests come and go, so there
    are steps with prompts, and rounds outside of graphs. What vLLM's own lines do is vLLM's affair."""
    import specattn_vllm
    from specattn_vllm import kernels
    from specattn_vllm.backend.builder import SpecAttnMetadataBuilder
    from specattn_vllm.metrics import snapshot
    from specattn_vllm.speculation.rounds import RoundSpeculator
    from specattn_vllm.speculation.speculator import SpecAttnSpeculator

    folders = [folder for package in (specattn_vllm, kernels) for folder in package.__path__]
    # Totals are read and published in each step, not once a second.
    monkeypatch.setattr("specattn_vllm.reporter.PUBLISH_S", 0.0)
    monkeypatch.delenv(snapshot.FOLDER, raising=False)
    llm = engine({**options, "stats_interval_s": 0.001}, disable_log_stats=False, **GRAPHS)
    lengths = [*LENGTHS, 333, 90, 1700]
    greedy(llm, prompts(lengths), NEW_TOKENS)  # what is compiled and allocated once
    calls = {"propose": 0, "build": 0}

    def watched(owner, name):
        call = getattr(owner, name)

        def run(self, *args, **kwargs):
            calls[name] += 1
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return call(self, *args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(owner, name, run)

    watched(RoundSpeculator, "propose")
    watched(SpecAttnSpeculator, "propose")
    watched(SpecAttnMetadataBuilder, "build")
    numbers, place = torch.zeros(4, device="cuda"), torch.tensor([1], device="cuda")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        greedy(llm, prompts(lengths), NEW_TOKENS)
        waits = [w for w in seen if "synchroniz" in str(w.message)]
        ours = [f"{w.filename}:{w.lineno}" for w in waits if any(w.filename.startswith(f) for f in folders)]
        del seen[:]
        torch.cuda.set_sync_debug_mode("warn")
        numbers[place] = 1
        torch.cuda.set_sync_debug_mode("default")
        assert any("synchroniz" in str(w.message) for w in seen), "what this test looks for would not be seen"
    assert min(calls.values()) > 10
    [published] = snapshot.read_all(snapshot.folder())
    assert published.counts.rounds > 0
    assert not ours, sorted({*ours})


@pytest.mark.parametrize("drafter", [True, False], ids=["draft model", "no speculation"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"ratio": 1.0}, id="everything"),
        pytest.param({"ratio": 0.2, "min_tokens": 80}, id="ratio"),
        pytest.param({"top_p": 0.9, "min_tokens": 80, "sketch_bits": 4}, id="top_p"),
        pytest.param({"ratio": 0.2, "min_tokens": 80, "crossover_tokens": 10**6}, id="below-the-crossover"),
        pytest.param({"ratio": 0.2, "min_tokens": 80, "crossover_tokens": ACROSS}, id="across-the-crossover"),
    ],
)
def test_a_target_that_chooses_for_itself_chooses_alike_in_graphs(
    options, drafter, engine, greedy, prompts, counts, replayed
):
    own = {} if drafter else {"speculative_config": None}
    graphs = GRAPHS
    if not drafter:
        compilation = {**GRAPHS["compilation_config"], "cudagraph_capture_sizes": [1, 2, 4, 8]}
        graphs = {**GRAPHS, "compilation_config": compilation}
    given = prompts(TOGETHER if options.get("crossover_tokens") == ACROSS else LENGTHS)
    options = {"method": "sketch", **options}
    eager = engine(options, **own)
    expected, upstream = greedy(eager, given, NEW_TOKENS), counts(eager)
    llm = engine(options, **own, **graphs)
    assert greedy(llm, given, NEW_TOKENS) == expected
    seen = counts(llm)
    assert seen.kv_fraction == pytest.approx(upstream.kv_fraction, rel=0.01)
    assert replayed["target"] > 5
    if options.get("crossover_tokens") == ACROSS:
        assert 0 < seen.small_batch_rows == upstream.small_batch_rows
        assert 0 < seen.sparse_rows == upstream.sparse_rows
    elif options.get("ratio") == 1.0 or "crossover_tokens" in options:
        assert seen.kv_fraction == 1.0
        assert greedy(engine(None), prompts(LENGTHS), NEW_TOKENS) == expected
    else:
        assert seen.kv_fraction < 0.5
        assert 0 < seen.sparse_rows < seen.verify_rows
