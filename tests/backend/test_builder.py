"""The metadata builder: what a step hands to the pruner, and where CUDA graphs are offered. No engine is started."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
from vllm.v1.attention.backend import AttentionCGSupport

from specattn_vllm import executors
from specattn_vllm.backend.builder import SpecAttnMetadataBuilder
from specattn_vllm.executors import ExecutorError

CPU = torch.device("cpu")


@pytest.fixture
def builder():
    """A builder whose pruner returns what it was given."""
    made = object.__new__(SpecAttnMetadataBuilder)
    made.device = CPU
    made.pruner = SimpleNamespace(prune=lambda **step: step)
    made.target_capture = None
    made.target_choice = None
    return made


def common(slots: list[int], query_lens: list[int], prefilling: list[bool], padded_to: int) -> SimpleNamespace:
    """vLLM's metadata of a step of a graph's batch: rows without a request have no tokens."""
    real, fill = len(slots), padded_to - len(slots)
    starts = torch.tensor([0, *query_lens] + [0] * fill).cumsum(0).int()
    return SimpleNamespace(
        num_reqs=padded_to,
        num_actual_tokens=8 * padded_to,
        max_query_len=max(query_lens),
        max_seq_len=64,
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=torch.tensor([20 + r for r in range(real)] + [0] * fill, dtype=torch.int32),
        block_table_tensor=torch.arange(4 * padded_to, dtype=torch.int32).view(padded_to, 4),
        req_idx=np.array(slots),
        is_prefilling=torch.tensor(prefilling),
    )


@pytest.mark.parametrize("padded_to", [2, 5])
def test_rows_that_fill_a_batch_have_no_slot_and_do_not_prefill(builder, padded_to):
    given = common([3, 1], [4, 4], [False, True], padded_to)
    fill = padded_to - 2
    step = builder.build(0, given).sparse
    assert step["slots"].tolist() == step["slots_cpu"].tolist() == [3, 1] + [-1] * fill
    assert step["slots"].dtype == torch.int64
    assert step["prefilling"].tolist() == step["prefilling_cpu"].tolist() == [False, True] + [False] * fill
    assert step["query_start_loc"].tolist() == step["query_start_loc_cpu"].tolist() == [0, 4, 8] + [8] * fill
    assert step["seq_lens"].tolist() == [20, 21] + [0] * fill
    assert torch.equal(step["block_table"], given.block_table_tensor)


def test_flags_of_prefilling_rows_may_be_padded_already(builder):
    given = common([3, 1], [4, 4], [True, False, True, True], padded_to=4)
    assert builder.build(0, given).sparse["prefilling"].tolist() == [True, False, False, False]


@pytest.mark.parametrize("missing", ["pruner", "req_idx", "is_prefilling"])
def test_steps_that_are_not_the_target_s_are_not_pruned(builder, missing):
    """The draft's own carry no slots, its builders have no pruner, and profiling says nothing about prompts."""
    given = common([3, 1], [4, 4], [False, False], 2)
    setattr(builder if missing == "pruner" else given, missing, None)
    metadata = builder.build(0, given)
    assert metadata.sparse is None
    assert (metadata.num_reqs, metadata.num_actual_tokens, metadata.hook) == (2, 16, None)


class Capture:
    """Stands for the capture of a target that drafts for itself; says what it was told of a step."""

    def begin(self, query_start_loc, seq_lens, query_start_loc_cpu):
        assert query_start_loc is not query_start_loc_cpu
        return [tensor.tolist() for tensor in (query_start_loc, seq_lens, query_start_loc_cpu)]


@pytest.mark.parametrize("padded_to", [2, 5])
def test_a_target_that_drafts_for_itself_is_captured_in_each_step(builder, padded_to):
    builder.pruner, builder.target_capture = None, Capture()
    given = common([3, 1], [4, 4], [False, True], padded_to)
    metadata = builder.build(0, given)
    fill = padded_to - 2
    starts = [0, 4, 8] + [8] * fill
    assert metadata.hook == [starts, [20, 21] + [0] * fill, starts]
    assert metadata.sparse is None


def test_its_draft_steps_and_profiling_runs_are_not(builder):
    """They carry no slots: what the draft's own steps attend to is no verification."""
    builder.pruner, builder.target_capture = None, Capture()
    given = common([3, 1], [1, 1], [False, False], 2)
    given.req_idx = None
    assert builder.build(0, given).hook is None


def config(device: str, executor: str = "auto", dtype: torch.dtype = torch.bfloat16) -> SimpleNamespace:
    return SimpleNamespace(
        device_config=SimpleNamespace(device=device),
        model_config=SimpleNamespace(dtype=dtype),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        additional_config={"specattn": {"executor": executor}},
    )


@pytest.mark.parametrize(
    ("graphs", "support"), [(True, AttentionCGSupport.UNIFORM_BATCH), (False, AttentionCGSupport.NEVER)]
)
def test_graphs_are_offered_where_the_executor_can_be_captured(monkeypatch, graphs, support):
    asked = []

    def resolve(*arguments, per_head, fp8):
        asked.append((*arguments, per_head, fp8))
        return SimpleNamespace(graphs=graphs)

    monkeypatch.setattr(executors, "resolve", resolve)
    assert SpecAttnMetadataBuilder.get_cudagraph_support(config("cuda:0", "triton"), None) == support
    assert asked == [("triton", torch.device("cuda:0"), torch.bfloat16, True, False)]


def test_a_cpu_has_no_graphs():
    assert SpecAttnMetadataBuilder.get_cudagraph_support(config("cpu"), None) == AttentionCGSupport.NEVER


def test_an_executor_that_does_not_run_is_refused_here_too():
    with pytest.raises(ExecutorError, match="not in float32"):
        SpecAttnMetadataBuilder.get_cudagraph_support(config("cuda", "fa3", torch.float32), None)
