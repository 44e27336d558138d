"""Rounds of drafting as CUDA graphs: what they are handed, and which batches have one. Needs no GPU: nothing runs."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from specattn_vllm.speculation.graphs import RoundGraphs, RoundInputs, thinned

REQUESTS, QUERY = 5, 3
CPU = torch.device("cpu")


@pytest.fixture
def inputs():
    """Inputs of a round that hold an earlier, larger one, poisoned where the next writes."""
    made = RoundInputs(REQUESTS, QUERY, CPU)
    for tensor in (made.idx_mapping, made.num_sampled, made.num_rejected, made.last_sampled, made.seeds):
        tensor.fill_(77)
    made.temperature.fill_(0.5)
    for tensor in (made.buffers.input_ids, made.buffers.positions, made.buffers.seq_lens):
        tensor.fill_(77)
    return made


def step(reqs: int) -> dict:
    """A step of vLLM's, with buffers of more requests than it has."""
    tokens = reqs * QUERY
    batch = SimpleNamespace(
        num_reqs=reqs,
        num_tokens=tokens,
        num_scheduled_tokens=np.full(reqs, QUERY, dtype=np.int32),
        input_ids=torch.arange(100, 100 + tokens + 2, dtype=torch.int32),
        positions=torch.arange(200, 200 + tokens + 2),
        seq_lens=torch.arange(300, 300 + reqs, dtype=torch.int32),
        idx_mapping=torch.arange(4, 4 - reqs, -1),
    )
    return {
        "batch": batch,
        "num_sampled": torch.arange(1, reqs + 1, dtype=torch.int32),
        "num_rejected": torch.arange(2, reqs + 2, dtype=torch.int32),
        "last_sampled": torch.arange(50, 50 + REQUESTS).view(REQUESTS, 1),
        "temperature": torch.arange(REQUESTS) / 8,
        "seeds": torch.arange(60, 60 + REQUESTS),
    }


@pytest.mark.parametrize(("reqs", "rows"), [(2, 2), (2, 4), (1, 5), (5, 5)])
def test_a_step_is_copied_in_and_the_rows_behind_it_are_nobody(inputs, reqs, rows):
    given = step(reqs)
    inputs.load(rows=rows, **given)
    fill, tokens = rows - reqs, reqs * QUERY
    assert inputs.idx_mapping[:rows].tolist() == given["batch"].idx_mapping.tolist() + [-1] * fill
    assert inputs.num_sampled[:rows].tolist() == [*range(1, reqs + 1)] + [0] * fill
    assert inputs.num_rejected[:rows].tolist() == [*range(2, reqs + 2)] + [0] * fill
    assert inputs.buffers.seq_lens[:rows].tolist() == [*range(300, 300 + reqs)] + [0] * fill
    assert inputs.buffers.input_ids[: rows * QUERY].tolist() == [*range(100, 100 + tokens)] + [0] * fill * QUERY
    assert inputs.buffers.positions[: rows * QUERY].tolist() == [*range(200, 200 + tokens)] + [0] * fill * QUERY
    for held in (inputs.idx_mapping, inputs.num_sampled, inputs.num_rejected, inputs.buffers.seq_lens):
        assert (held[rows:] == 77).all()
    # These are by slot, not by row.
    assert inputs.last_sampled.tolist() == [*range(50, 50 + REQUESTS)]
    assert inputs.temperature.tolist() == [i / 8 for i in range(REQUESTS)]
    assert inputs.seeds.tolist() == [*range(60, 60 + REQUESTS)]


def test_a_cleared_round_has_no_request(inputs):
    inputs.clear()
    assert inputs.idx_mapping.tolist() == [-1] * REQUESTS
    for tensor in (inputs.num_sampled, inputs.num_rejected, inputs.buffers.seq_lens, inputs.buffers.positions):
        assert not tensor.any()


@pytest.mark.parametrize("rows", [1, 3, REQUESTS])
def test_the_batch_of_a_graph_reads_what_is_copied_in(inputs, rows):
    batch = inputs.batch(rows)
    assert (batch.num_reqs, batch.num_tokens) == (rows, rows * QUERY)
    assert batch.query_start_loc.tolist() == batch.query_start_loc_np.tolist() == [QUERY * r for r in range(rows + 1)]
    inputs.load(rows=rows, **step(rows))
    assert batch.idx_mapping.tolist() == [*range(4, 4 - rows, -1)]
    assert batch.seq_lens.tolist() == [*range(300, 300 + rows)]
    assert batch.input_ids.tolist() == [*range(100, 100 + rows * QUERY)]
    assert batch.positions.tolist() == [*range(200, 200 + rows * QUERY)]


def test_batches_of_all_sizes_lie_at_the_same_addresses(inputs):
    places = set()
    for rows in (1, REQUESTS, 2):
        batch = inputs.batch(rows)
        held = (batch.idx_mapping, batch.query_start_loc, batch.seq_lens, batch.input_ids, batch.positions)
        places.add(tuple(tensor.data_ptr() for tensor in held))
    assert len(places) == 1


def test_there_is_something_before_the_first_slot_s_last_token(inputs):
    """Upstream reads the token of slot -1 of rows that fill a batch."""
    assert inputs.last_sampled.storage_offset() == 1
    # Upstream asks for 32 bits, and another dtype would be copied: the graph would then read that copy forever.
    assert inputs.last_sampled.int().data_ptr() == inputs.last_sampled.data_ptr()
    assert inputs.num_rejected.int().data_ptr() == inputs.num_rejected.data_ptr()


@pytest.fixture
def graphs(inputs):
    """Graphs of 2 and 4 rows; vLLM's manager is asked for them as in a real run, without a GPU to capture on."""
    made = object.__new__(RoundGraphs)
    made.inputs, made._graphs_captured = inputs, True
    made._lora_dispatch_map, made._max_lora_case = {}, 0
    descs = [
        BatchExecutionDescriptor(CUDAGraphMode.FULL, num_tokens=rows * QUERY, num_reqs=rows, uniform_token_count=QUERY)
        for rows in (2, 4)
    ]
    made._candidates = {(tokens, 0): [descs[tokens > 2 * QUERY]] for tokens in range(4 * QUERY + 1)}
    return made


@pytest.mark.parametrize(("reqs", "rows"), [(1, 2), (2, 2), (3, 4), (4, 4), (5, None)])
def test_a_uniform_batch_has_the_next_larger_graph(graphs, reqs, rows):
    desc = graphs.find(step(reqs)["batch"])
    assert (desc and desc.num_reqs) == rows


@pytest.mark.parametrize("scheduled", [[QUERY, 1], [1, 1], [QUERY + 1, QUERY - 1], [QUERY + 1, QUERY + 1]], ids=str)
def test_other_batches_have_none(graphs, scheduled):
    """Also if they only have as many tokens on the whole: rows of a graph are all alike."""
    batch = step(2)["batch"]
    batch.num_scheduled_tokens = np.array(scheduled)
    batch.num_tokens = sum(scheduled)
    assert graphs.find(batch) is None


def test_before_capture_there_are_none(graphs):
    graphs._graphs_captured = False
    assert graphs.find(step(2)["batch"]) is None


VLLM_SIZES = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]


@pytest.mark.parametrize("query_len", [2, 5, 6, 9])
def test_few_graphs_and_little_padding(query_len):
    sizes = thinned(VLLM_SIZES, query_len)
    rows = [-(-size // query_len) for size in sizes]
    assert len(rows) <= 16 < len(VLLM_SIZES)
    assert rows == sorted(set(rows))
    largest = max(-(-size // query_len) for size in VLLM_SIZES if -(-size // query_len) * query_len <= 512)
    assert rows[-1] == largest
    # No batch runs in a graph of much more than half as many rows again, nor do small ones of a row more than needed.
    for reqs in range(1, largest + 1):
        fits = next(n for n in rows if n >= reqs)
        assert fits <= max(1.5 * reqs + 1, 2)


def test_sizes_that_were_chosen_by_hand_all_stay():
    assert thinned([6, 24, 96], 6) == [6, 24, 96]
    assert thinned([5, 10, 20, 40], 5) == [5, 10, 20, 40]
    assert thinned([], 6) == []


def test_vllm_s_manager_plans_the_graphs_of_those_sizes_and_keeps_its_own():
    made = object.__new__(RoundGraphs)
    config = SimpleNamespace(cudagraph_capture_sizes=VLLM_SIZES, max_cudagraph_capture_size=512)
    made.compilation_config, made.cudagraph_mode = config, CUDAGraphMode.FULL_DECODE_ONLY
    made.vllm_config = SimpleNamespace(speculative_config=None)
    made.max_num_reqs, made.decode_query_len, made.varlen_decode, made.ubatch_runner = 256, 6, False, None
    made.lora_capture_cases, made._candidates, made._capture_descs = [0], {}, {}
    made._init_candidates()
    assert config.cudagraph_capture_sizes is VLLM_SIZES, "the target's graphs are made of them too"
    [planned] = made._capture_descs.values()
    assert sorted(d.num_reqs for d in planned) == [-(-size // 6) for size in thinned(VLLM_SIZES, 6)]
    assert made._candidates[17 * 6, 0][0].num_reqs == 20
