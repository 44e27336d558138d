"""Patches of a worker: its speculator, and what it answers when it is asked for statistics."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
import torch
from transformers import LlamaConfig
from vllm.config import AttentionConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.worker.gpu import spec_decode
from vllm.v1.worker.gpu.spec_decode.standalone_ar import speculator as upstream
from vllm.v1.worker.worker_base import WorkerBase

from specattn_vllm import compat
from specattn_vllm.stats import Counters

# The speculator


class Stock:
    """Stands for vLLM's speculator, which would allocate its buffers."""

    def __init__(self, *arguments) -> None:
        self.arguments = arguments


class Ours(Stock):
    pass


class Counting(Stock):
    pass


class Sketching(Stock):
    pass


@pytest.fixture
def stand_ins(monkeypatch):
    # Imported before its base class is replaced.
    from specattn_vllm.speculation import rounds, sketch_speculator, speculator

    monkeypatch.setattr(rounds, "RoundSpeculator", Counting)
    monkeypatch.setattr(speculator, "SpecAttnSpeculator", Ours)
    monkeypatch.setattr(sketch_speculator, "SketchSpeculator", Sketching)
    monkeypatch.setattr(upstream, "StandaloneARSpeculator", Stock)
    compat.choose_speculator()


def engine_config(backend: str | None, **options):
    return SimpleNamespace(
        attention_config=AttentionConfig(backend=backend), additional_config={"specattn": options} if options else {}
    )


@pytest.mark.parametrize(
    ("backend", "options", "wanted"),
    [
        ("specattn", {}, Sketching),
        ("specattn", {"sparse_draft": False}, Counting),
        ("specattn", {"method": "specattn"}, Ours),
        ("specattn", {"method": "dense", "sparse_draft": True}, Sketching),
        (None, {}, Stock),
        ("TRITON_ATTN", {}, Stock),
        ("FLASH_ATTN", {}, Stock),
    ],
)
def test_only_our_backend_gets_our_speculator(stand_ins, backend, options, wanted):
    config, device = engine_config(backend, **options), torch.device("cpu")
    made = upstream.StandaloneARSpeculator(config, device)
    assert type(made) is wanted
    assert made.arguments == (config, device)
    assert compat.stock_speculator() is Stock


@pytest.mark.parametrize(("backend", "wanted"), [("specattn", Sketching), (None, Stock)])
def test_vllm_builds_the_speculator_through_the_name_that_is_replaced(
    stand_ins, tmp_path, monkeypatch, backend, wanted
):
    llama = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=64,
        vocab_size=128,
        max_position_embeddings=128,
    )
    llama.save_pretrained(tmp_path / "model")
    path = str(tmp_path / "model")
    config = EngineArgs(
        model=path,
        skip_tokenizer_init=True,
        enforce_eager=True,
        attention_backend=backend,
        speculative_config={"model": path, "num_speculative_tokens": 2},
    ).create_engine_config()
    assert type(spec_decode.init_speculator(config, torch.device("cpu"), None)) is wanted


def test_our_speculator_is_vllm_s_own_class_extended():
    from specattn_vllm.speculation.speculator import SpecAttnSpeculator

    assert issubclass(SpecAttnSpeculator, compat.stock_speculator())


# Statistics


def worker(**speculator):
    """A worker whose runner has a speculator with these attributes."""
    instance = object.__new__(WorkerBase)
    instance.model_runner = SimpleNamespace(speculator=SimpleNamespace(**speculator))
    return instance


def test_a_worker_reports_its_counts():
    counters = Counters(torch.device("cpu"))
    counters.add(rounds=2, kv_read=torch.tensor(7))
    report = worker(counters=counters).specattn_stats()
    assert (report["rounds"], report["kv_read"], report["kv_full"]) == (2, 7, 0)
    assert json.loads(json.dumps(report)) == report


def test_a_worker_beside_a_drafter_of_vllm_s_reports_what_is_counted_of_it():
    beside = worker()
    beside.model_runner.specattn_counters = Counters(torch.device("cpu"))
    beside.model_runner.specattn_counters.add(rounds=3)
    assert beside.specattn_stats()["rounds"] == 3
    del beside.model_runner.speculator
    assert beside.specattn_stats()["rounds"] == 3


def test_a_worker_without_our_backend_reports_nothing():
    assert worker().specattn_stats() is None
    without = worker()
    del without.model_runner.speculator
    assert without.specattn_stats() is None
    assert without.specattn_audit() is None
    assert worker(audit=None).specattn_audit() is None


# Rows and their requests


def test_a_model_state_that_is_not_known_is_refused():
    """Its steps would look like those of profiling, and all rows would be dense without a word."""

    class DefaultModelState:
        def prepare_attn(self): ...

    class Known(DefaultModelState):
        pass

    class Unknown(DefaultModelState):
        def prepare_attn(self): ...

    config = SimpleNamespace(is_hybrid=False)
    compat.name_rows(SimpleNamespace(model_state=Known(), model_config=config))
    with pytest.raises(ValueError, match="model state Unknown: it is not known to tell"):
        compat.name_rows(SimpleNamespace(model_state=Unknown(), model_config=config))
