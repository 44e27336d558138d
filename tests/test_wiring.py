"""Joining draft and target: what does not fit is refused with the numbers and the remedy."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from specattn_vllm.speculation import wiring
from specattn_vllm.speculation.wiring import Selection

GIB = 2**30


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A speculator on a GPU on which the weights have left 40 GiB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 * GIB, 141 * GIB))
    return SimpleNamespace(device=torch.device("cuda"), max_num_reqs=1024, max_model_len=131072)


def test_buffers_that_would_crowd_out_the_cache_are_refused(on_a_gpu):
    with pytest.raises(ValueError) as caught:
        wiring._refuse_if_too_large(88 * GIB, on_a_gpu)
    message = str(caught.value)
    for part in ("88.0 GiB", "max_num_seqs = 1024", "max_model_len = 131072", "40.0 GiB", "lower --max-num-seqs"):
        assert part in message


def test_buffers_of_half_of_what_is_free_are_accepted(on_a_gpu):
    wiring._refuse_if_too_large(20 * GIB, on_a_gpu)
    with pytest.raises(ValueError):
        wiring._refuse_if_too_large(20 * GIB + 1, on_a_gpu)


def test_a_cpu_is_not_asked_how_much_is_free(on_a_gpu):
    on_a_gpu.device = torch.device("cpu")
    wiring._refuse_if_too_large(88 * GIB, on_a_gpu)


@pytest.mark.parametrize("groups", [[], [["a"], ["b"]]], ids=["none", "two"])
def test_target_layers_in_several_attention_groups_are_refused(groups):
    selection = Selection(capture=None, store=None, pruner=SimpleNamespace(layer_sources={"a": 0, "b": 0}))
    made = [[SimpleNamespace(layer_names=names) for names in groups]]
    with pytest.raises(ValueError, match=f"one attention group, but vLLM made {len(groups)}"):
        selection.attach(made)
