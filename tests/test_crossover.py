"""Where pruning starts to pay: the option's word, else what was measured for the executor."""

from __future__ import annotations

import dataclasses

import pytest

from specattn_vllm import executors
from specattn_vllm.methods import METHODS
from specattn_vllm.options import SpecAttnOptions


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    crossovers = {
        "specattn": {"fa3": 9000, "triton": 20000},
        "vegas": {"fa3": 700},
        "streamingllm": {"fa3": 700},
        "sketch": {"fa3": 8000},
        "dense": {"fa3": 500},
    }
    for name, tokens in crossovers.items():
        monkeypatch.setitem(METHODS, name, dataclasses.replace(METHODS[name], crossover=tokens))


def test_what_was_measured_for_the_executor_is_the_default():
    assert SpecAttnOptions.parse({"method": "specattn"}).crossover("fa3") == 9000
    assert SpecAttnOptions.parse({"method": "specattn"}).crossover("triton") == 20000


@pytest.mark.parametrize("method", ["vegas", "streamingllm"])
def test_a_target_that_drafts_for_itself_starts_elsewhere(method):
    assert SpecAttnOptions.parse({"method": method}).crossover("fa3") == 700
    assert SpecAttnOptions.parse({"method": method}).crossover("triton") == 0


def test_what_searches_starts_where_a_search_pays():
    assert SpecAttnOptions.parse({"method": "sketch"}).crossover("fa3") == 8000
    assert SpecAttnOptions.parse({"method": "dense", "sparse_draft": True}).crossover("fa3") == 500


def test_what_was_not_measured_is_always_pruned():
    assert SpecAttnOptions.parse({"method": "specattn"}).crossover("torch") == 0


@pytest.mark.parametrize("name", ["fa3", "torch"])
@pytest.mark.parametrize("tokens", [0, 1, 123456])
def test_the_option_has_the_last_word(name, tokens):
    # 0 is an answer too: prune always.
    assert SpecAttnOptions.parse({"method": "specattn", "crossover_tokens": tokens}).crossover(name) == tokens


def test_only_executors_that_there_are_have_been_measured(monkeypatch):
    monkeypatch.undo()
    for method in METHODS.values():
        assert {*method.crossover} <= set(executors.CHOICES) - {"auto"}
