"""Rounds of drafting as CUDA graphs: what they are handed, and which batches have one. Needs no GPU: nothing runs."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from specattn_vllm.speculation.graphs import RoundGraphs, RoundInputs

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
