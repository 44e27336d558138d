"""The clock around a selection: what lies between its ends, in and out of a CUDA graph."""

from __future__ import annotations

import time

import pytest
import torch

from specattn_vllm.kernels import reference
from specattn_vllm.kernels.bookkeeping import kernels as bookkeeping

OPS = pytest.mark.parametrize("ops", [bookkeeping, reference], ids=["kernel", "reference"])
POISON = -858993460
WORK_NS = 20_000_000


@OPS
def test_a_clock_adds_what_runs_between_its_ends(ops, device):
    if ops is reference and device.type != "cpu":
        pytest.skip("the reference has the host's clock, which does not wait for a GPU")
    began, total = (torch.tensor([5, POISON], device=device) for _ in range(2))
    before = time.perf_counter_ns()
    for _ in range(2):
        ops.start_clock(began[:1])
        work(device)
        ops.stop_clock(began[:1], 3, total[:1])
        work(device)  # not measured
    wait(device)
    passed = time.perf_counter_ns() - before
    measured = (int(total[0]) - 5) / 3
    assert 2 * 0.9 * WORK_NS < measured < passed - 2 * 0.9 * WORK_NS
    assert [int(x[1]) for x in (began, total)] == [POISON] * 2


def work(device) -> None:
    """Takes WORK_NS at least: on the GPU's stream, or on the host."""
    if device.type == "cuda":
        torch.cuda._sleep(WORK_NS * 2)  # cycles, at most 2 for each nanosecond
    else:
        time.sleep(WORK_NS / 1e9)


def wait(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@pytest.mark.gpu
def test_a_clock_runs_in_a_captured_graph(device):
    if device.type != "cuda":
        pytest.skip("needs a GPU: CUDA graphs")
    began, total = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))

    def measured() -> None:
        bookkeeping.start_clock(began)
        work(device)
        bookkeeping.stop_clock(began, 1, total)

    measured()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        measured()
    total.zero_()
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    ends[0].record()
    for _ in range(5):
        graph.replay()
    ends[1].record()
    torch.cuda.synchronize()
    milliseconds = ends[0].elapsed_time(ends[1])
    assert 0.9 * milliseconds < int(total) / 1e6 < milliseconds
