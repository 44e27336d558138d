"""Buffers that are too large are refused, with numbers and a remedy."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.speculation import wiring

GIB = 2**30
CPU = torch.device("cpu")
REQUESTS, LONGEST, DRAFT_HEADS, KV_HEADS, STEPS = 3, 70, 4, 2, 4
ROW = 128  # LONGEST, rounded up to whole vectors


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A speculator on a GPU on which the weights have left 40 GiB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 * GIB, 141 * GIB))
    return SimpleNamespace(device=torch.device("cuda"), max_num_reqs=1024, max_model_len=131072)


def test_buffers_that_would_crowd_out_the_cache_are_refused(on_a_gpu):
    with pytest.raises(ValueError) as caught:
        wiring.refuse_if_too_large({"scores": 60 * GIB, "page tables": 28 * GIB}, on_a_gpu)
    message = str(caught.value)
    for part in ("88.0 GiB", "max_num_seqs = 1024", "max_model_len = 131072", "40.0 GiB", "lower --max-num-seqs"):
        assert part in message
    # What is large is named, because not all of it grows with the same number.
    assert f"(scores {60 * 1024:.1f} MiB, page tables {28 * 1024:.1f} MiB)" in message


def test_tables_per_head_have_one_remedy_more(on_a_gpu):
    remedy = SpecAttnOptions.parse({"method": "sts"}).kind.smaller
    with pytest.raises(ValueError, match="lower --max-num-seqs or --max-model-len, or set method='specattn', whose"):
        wiring.refuse_if_too_large({"page tables": 28 * GIB}, on_a_gpu, remedy)


def test_buffers_of_half_of_what_is_free_are_accepted(on_a_gpu):
    wiring.refuse_if_too_large({"scores": 15 * GIB, "mass": 5 * GIB}, on_a_gpu)
    with pytest.raises(ValueError):
        wiring.refuse_if_too_large({"scores": 15 * GIB, "mass": 5 * GIB + 1}, on_a_gpu)


def test_a_cpu_is_not_asked_how_much_is_free(on_a_gpu):
    on_a_gpu.device = CPU
    wiring.refuse_if_too_large({"scores": 88 * GIB}, on_a_gpu)


class Buffers:
    """128 GiB of scores that `make` allocates, on whatever device it is asked for."""

    def __init__(self, make) -> None:
        self.scores = make(128 * GIB, dtype=torch.uint8)
        self.nbytes = {"scores": self.scores.nbytes}


def out_of_memory(*shape, **arguments):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 128.00 GiB.\nSee documentation for more")


def no_memory_on_a_cpu(*shape, **arguments):
    """What PyTorch says then; the size is one that no machine has."""
    return torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize("fails", [out_of_memory, no_memory_on_a_cpu])
def test_memory_that_is_gone_when_buffers_are_made_is_told_with_sizes_and_a_remedy(fails):
    """On a GPU, between the look at what is free and the allocation; on a CPU, where nobody looks before."""
    runner = SimpleNamespace(device=CPU, max_num_reqs=1024, max_model_len=131072)

    def make(device: torch.device) -> Buffers:
        return Buffers(fails if device == CPU else lambda *shape, **how: torch.empty(*shape, **how, device=device))

    with pytest.raises(ValueError) as caught:
        wiring.allocated(make, runner, ", or set ratio")
    message = str(caught.value)
    for part in ("128.0 GiB (scores", "max_num_seqs = 1024", "max_model_len = 131072", "allocation failed"):
        assert part in message
    assert "lower --max-num-seqs or --max-model-len, or set ratio; or free memory" in message
    assert "allocate" in message.partition("(")[2].rpartition("(")[2] and "\n" not in message
    assert caught.value.__suppress_context__, "a traceback from the middle is shown too"


def test_other_errors_of_making_buffers_are_not_taken_for_a_lack_of_memory():
    def make(device: torch.device) -> Buffers:
        if device == CPU:
            raise RuntimeError("shapes do not fit")
        return Buffers(lambda *shape, **how: torch.empty(*shape, **how, device=device))

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        wiring.allocated(make, SimpleNamespace(device=CPU, max_num_reqs=1, max_model_len=1))
