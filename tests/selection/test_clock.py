"""The time of selections: of one layer for all, and of what runs in a clock alone."""

from __future__ import annotations

import time

import pytest
import torch

from specattn_vllm import executors
from specattn_vllm.selection.clock import Clock
from specattn_vllm.selection.own_choice import LayerChoice, measure
from specattn_vllm.stats import Counters

OPERATIONS = executors.resolve("torch", torch.device("cpu"))
NS = 20_000_000


def spend() -> None:
    time.sleep(NS / 1e9)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_one_layer_is_measured_for_all(number):
    layers = [LayerChoice() for _ in range(number)]
    counters = Counters(torch.device("cpu"))
    measure(layers, OPERATIONS, counters.on_device("draft_selection_ns"))
    began = time.perf_counter_ns()
    for _ in range(2):  # two steps
        for layer in layers:
            with layer.clock:
                spend()
    passed = time.perf_counter_ns() - began
    counts = counters.read()
    assert 2 * NS * number <= counts.draft_selection_ns < number * passed
    assert counts.selection_ns == 0
    assert counts.draft_selection_ns % number == 0


def test_what_runs_outside_is_not_measured_and_a_reset_begins_anew():
    counters = Counters(torch.device("cpu"))
    clock = Clock(OPERATIONS, counters.on_device("selection_ns"))
    began = time.perf_counter_ns()
    with clock:
        pass
    spend()
    with clock:
        pass
    passed = time.perf_counter_ns() - began
    assert 0 < counters.read().selection_ns <= passed - NS
    counters.reset()
    assert counters.read().selection_ns == 0
    with clock:
        spend()
    assert counters.read().selection_ns >= NS
