"""fp8 KV caches: what is read is what was written, with the scales of each layer, whoever selects."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from specattn_vllm import executors
from specattn_vllm.kernels.fp8 import rounded
from specattn_vllm.methods import METHODS
from specattn_vllm.metrics import publish
from specattn_vllm.options import SpecAttnOptions

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

FP8 = {"kv_cache_dtype": "fp8"}
ALONE = {"speculative_config": None}
NGRAMS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
PART = {"min_tokens": 32, "recent_tokens": 8, "ratio": 0.15}
SCALES = (0.37, 2.6)  # of keys, and of values
NUMBER = 24


@pytest.fixture
def texts(prompts):
    return prompts([90, 300, 420, 900])


def rescale(llm) -> None:
    """Give all layers scales, as a checkpoint may."""

    def change(worker):
        for layer in worker.model_runner.compilation_config.static_forward_context.values():
            for name, scale in zip(("k", "v"), SCALES, strict=True):
                getattr(layer, f"_{name}_scale").fill_(scale)
                setattr(layer, f"_{name}_scale_float", scale)

    llm.collective_rpc(change)


@pytest.fixture(scope="module")
def known() -> dict[bool, list[list[int]]]:
    return {}


@pytest.fixture
def dense(engine, greedy, texts, known):
    """dense(scaled) -> tokens of an engine that reads all of an fp8 cache. Ends the engine that the test has."""

    def tokens(scaled: bool) -> list[list[int]]:
        if scaled not in known:
            llm = engine({"method": "dense"}, **ALONE, **FP8)
            if scaled:
                rescale(llm)
            known[scaled] = greedy(llm, texts, NUMBER)
        return known[scaled]

    return tokens


@pytest.mark.parametrize("scales", [(1.0, 1.0), SCALES], ids=str)
def test_it_is_a_cache_of_rounded_numbers(scales, engine, answers, same, texts, monkeypatch):
    """The oracle: a cache of the model's dtype, into which rounded numbers are written."""

    def write(key, value, kv_cache, slot_mapping, *_):
        key, value = (rounded(x, s).float() * s for x, s in zip((key, value), scales, strict=True))
        executors.write_kv(key, value, kv_cache, slot_mapping)

    llm = engine({"method": "dense"}, **ALONE, **FP8)
    if scales == SCALES:
        rescale(llm)
    found = answers(llm, texts, NUMBER)
    with monkeypatch.context() as patch:
        patch.setattr(executors, "cache_dtype", lambda config: torch.float32)
        llm = engine({"method": "dense"}, **ALONE)
        for layer in llm.collective_rpc(lambda worker: [*layers_of(worker)])[0]:
            layer.impl.operations = executors.replace(layer.impl.operations, write_kv=write)
        # What differs by 1e-6 between the two may round to neighbours in a later layer. On a GPU, products of float32
        # have 11 bits: all of a number of 8 bits, and not all of that times its scale.
        close = 0.2 if torch.cuda.is_available() else 0.02
        assert all(same(*pair, close) for pair in zip(answers(llm, texts, NUMBER), found, strict=True))


def layers_of(worker):
    return worker.model_runner.compilation_config.static_forward_context.values()


EVERYTHING = {
    "sketch": ({"ratio": 1.0}, ALONE),
    "sketch with a draft model": ({"method": "sketch", "ratio": 1.0, "draft_ratio": 0.2}, {}),
    "sketch with n-grams": ({"method": "sketch", "ratio": 1.0}, {"speculative_config": NGRAMS}),
    "dense": ({"method": "dense", "sparse_draft": True} | PART, {}),
    "specattn": ({"method": "specattn", "top_p": 1.0, "min_tokens": 32}, {}),
    "sts": ({"method": "sts", "layer_map": "uniform", "top_p": 1.0, "min_tokens": 32}, {}),
    "vegas": ({"method": "vegas", "crossover_tokens": 0} | PART, {}),
    "streamingllm": ({"method": "streamingllm", "crossover_tokens": 0} | PART, {}),
}
"""Setting -> options with which the target reads everything, and arguments of the engine."""


LONG = ("sketch with n-grams", "sts", "streamingllm")
"""Settings whose code others run too."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in LONG else ()) for name in EVERYTHING]
)
def test_who_reads_everything_gives_the_tokens_of_dense(name, engine, greedy, texts, dense, audit):
    options, arguments = EVERYTHING[name]
    expected = dense(True)
    llm = engine({"method": "sketch"} | options, **arguments, **FP8)
    rescale(llm)
    assert greedy(llm, texts, NUMBER) == expected


def test_every_method_is_here():
    assert {options.get("method", "sketch") for options, _ in EVERYTHING.values()} == {*METHODS}


@pytest.mark.parametrize(
    ("options", "arguments"),
    [({"sketch_bits": 4}, ALONE), ({"draft_ratio": 0.2}, {}), ({"epsilon": 0.2}, ALONE)],
    ids=["alone, 4 bits", "draft model", "guarantee"],
)
def test_a_part_is_read_by_codes_of_the_cache(options, arguments, engine, greedy, texts, dense, counts, sketch_audit):
    expected = dense(False)
    llm = engine({"method": "sketch"} | PART | options, **arguments, **FP8)
    found = greedy(llm, texts, NUMBER)
    assert sketch_audit.pruned > 20
    seen = counts(llm)
    assert 0 < seen.kv_fraction < 1
    [runner] = llm.collective_rpc(lambda worker: worker.model_runner)
    cache = publish._caches(runner, SpecAttnOptions.from_vllm(runner.vllm_config))["verification"]
    assert (cache.entry, cache.code) == (2 * 64, 64 * options.get("sketch_bits", 2) // 8 + 2)
    agree = sum(ours[:8] == theirs[:8] for ours, theirs in zip(found, expected, strict=True))
    assert agree >= len(texts) / 2


@pytest.fixture
def scaled_checkpoint(demo_pair, tmp_path) -> str:
    """The demo target as a checkpoint that asks for an fp8 cache, with scales, as compressed-tensors writes them."""
    folder = tmp_path / "scaled"
    shutil.copytree(demo_pair[0], folder)
    config = json.loads((folder / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    quantization = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "ignore": []}
    quantization |= {"quantization_status": "compressed", "kv_cache_scheme": scheme}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    weights = load_file(folder / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        for name, scale in zip(("k", "v"), SCALES, strict=True):
            weights[f"model.layers.{layer}.self_attn.{name}_scale"] = torch.tensor([scale])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_a_checkpoint_asks_for_it_and_brings_scales(scaled_checkpoint, engine, greedy, texts, dense, sketch_audit):
    """Without --kv-cache-dtype. The centre is that of keys as they are in the cache."""
    expected = dense(True)

    def centre(llm) -> torch.Tensor:
        return next(layer.impl.choice.centre for layer in llm.collective_rpc(lambda w: [*layers_of(w)])[0]).clone()

    whole = centre(engine({"method": "sketch"}, **ALONE))
    llm = engine({"method": "sketch", "ratio": 1.0}, target=scaled_checkpoint, **ALONE)
    assert greedy(llm, texts, NUMBER) == expected
    torch.testing.assert_close(centre(llm), whole / SCALES[0], rtol=1e-3, atol=1e-4)
    [runner] = llm.collective_rpc(lambda worker: worker.model_runner)
    assert publish._caches(runner, SpecAttnOptions.from_vllm(runner.vllm_config))["verification"].entry == 2 * 64
    llm = engine({"method": "sketch"} | PART, target=scaled_checkpoint, **ALONE)
    greedy(llm, texts, NUMBER)
    assert sketch_audit.pruned > 20


def test_a_block_takes_half_the_bytes(engine):
    def block(**arguments):
        llm = engine({"method": "sketch"}, **ALONE, **arguments)
        [sizes] = llm.collective_rpc(
            lambda worker: [x.kv_cache.stride(0) * x.kv_cache.itemsize for x in layers_of(worker)]
        )
        return sizes[0], next(iter(llm.collective_rpc(lambda w: [x.kv_cache.shape for x in layers_of(w)])[0]))

    (large, (_, heads, tokens, row)), (small, _) = block(), block(**FP8)
    sketch = heads * tokens * (row // 2 // 4 + 2)
    for found, size in ((large, 4 * row), (small, row)):  # whole rows of one token and head
        assert found == heads * tokens * size + -(-sketch // size) * size


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention 3 needs an NVIDIA GPU")
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_flash_attention_reads_it_as_stock_vllm_does(eager, engine, answers, same, texts):
    """In 16 bits. Stock vLLM's FlashAttention rounds queries to 8 bits, and so does ours where it reads everything."""
    arguments = {"dtype": "bfloat16", "enforce_eager": eager, **ALONE, **FP8}
    expected = answers(engine(None, **arguments), texts, NUMBER)
    for options in ({"method": "dense"}, {"method": "sketch", "ratio": 1.0}, {"method": "sketch"} | PART):
        llm = engine(options, **arguments)
        for exact in (True, False):
            found = answers(llm, texts, NUMBER, exact=exact)
            close = 0.1 if exact or options["method"] == "dense" else 1.5
            assert all(same(*pair, close) for pair in zip(expected, found, strict=True)), (options, exact)
