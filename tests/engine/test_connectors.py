"""Blocks that a KV connector brings have no sketch, or that of other keys: it is made anew before it is searched.

On a GPU run this file alone: vLLM's offloading to the CPU leaves memory registered when an engine ends, and what later
engines of the same process allocate may fail, or be written to. A server's process ends with its engine.
"""

from __future__ import annotations

import pytest
import torch
from vllm import SamplingParams

from specattn_vllm.kernels.sketch.layout import sketch_views
from specattn_vllm.sketch.layer import LayerSketch

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

SHAPE = {
    "skip_tokenizer_init": True,
    "max_model_len": 512,
    # The connector stores a prompt with its first chunk, so there must be only one.
    "max_num_batched_tokens": 1024,
    "max_num_seqs": 4,
    "block_size": 32,
}
LENGTHS = [260, 77, 200]
NEW_TOKENS = 12
PART = {"ratio": 0.2, "min_tokens": 32, "recent_tokens": 16, "crossover_tokens": 0}
DRAFT = {"method": "draft_model", "num_speculative_tokens": 3}
NGRAMS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
OWN = object()
"""A draft model, or what the method drafts with."""


def random_prompts(lengths: list[int]) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    return [{"prompt_token_ids": torch.randint(2, 500, (n,), generator=generator).tolist()} for n in lengths]


@pytest.fixture
def loads(monkeypatch):
    """The tokens that were put into a layer's cache without its knowing, by call."""
    from specattn_vllm.backend.impl import SpecAttnImpl

    seen, note_filled = [], SpecAttnImpl.note_filled

    def watched(impl, layer, slot_mapping):
        seen.append(len(slot_mapping))
        note_filled(impl, layer, slot_mapping)

    monkeypatch.setattr(SpecAttnImpl, "note_filled", watched)
    return seen


def runner_of(llm):
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def forget_all(llm) -> None:
    """As after a restart: no cached prefix is left, and no code of a key."""
    while not llm.reset_prefix_cache():  # what a connector or a step in flight still holds
        llm.generate({"prompt_token_ids": [7]}, SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    for layer in runner_of(llm).compilation_config.static_forward_context.values():
        choice = getattr(getattr(layer, "impl", None), "choice", None)
        if isinstance(choice, LayerSketch):
            codes, scales = sketch_views(layer.kv_cache, choice.sketch.bits)
            codes.fill_(0xA5)
            scales.fill_(float("nan"))


@pytest.fixture
def stored(engine, tiny_model, tmp_path, loads):
    """stored(options, speculation, **arguments) -> an engine that keeps its KV cache in files."""

    def make(options, speculation=None, **arguments):
        if speculation is DRAFT:
            speculation = DRAFT | {"model": tiny_model("draft_model")}
        connector = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
        connector["kv_connector_extra_config"] = {"shared_storage_path": str(tmp_path)}
        given = SHAPE | {"kv_transfer_config": connector} | arguments
        if speculation is not OWN:
            given["speculative_config"] = speculation
        llm = engine(options, target=tiny_model("target"), draft=tiny_model("draft_model"), **given)
        loads.clear()  # one warms up
        return llm

    return make


@pytest.mark.parametrize(
    ("options", "speculation", "arguments"),
    [
        ({}, None, {}),
        ({}, NGRAMS, {}),
        ({"sparse_draft": True}, DRAFT, {}),
        ({"sparse_draft": True}, DRAFT, {"kv_cache_dtype": "fp8"}),
    ],
    ids=["alone", "ngram", "draft_model", "fp8"],
)
def test_a_sketch_is_that_of_the_keys_that_were_loaded(
    stored, greedy, loads, sketch_audit, options, speculation, arguments
):
    """The answers are those that follow a prefix which vLLM itself has cached."""
    options = {"method": "sketch", **PART, **options}
    llm = stored(options, speculation, kv_transfer_config=None, **arguments)
    assert greedy(llm, random_prompts(LENGTHS), NEW_TOKENS)
    expected = greedy(llm, random_prompts(LENGTHS), NEW_TOKENS)
    llm = stored(options, speculation, **arguments)
    greedy(llm, random_prompts(LENGTHS), NEW_TOKENS)
    assert not loads
    forget_all(llm)
    before = sketch_audit.pruned, sketch_audit.followed
    assert greedy(llm, random_prompts(LENGTHS), NEW_TOKENS) == expected
    assert set(loads) == {n // 32 * 32 for n in LENGTHS}
    assert sketch_audit.pruned > before[0] > 0
    assert (sketch_audit.followed > before[1]) == (speculation is DRAFT)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "dense"},
        {"method": "specattn", "top_p": 0.6, "min_tokens": 16, "crossover_tokens": 0},
        {"method": "sts", "top_p": 0.6, "min_tokens": 16, "crossover_tokens": 0},
        {"method": "vegas", "ratio": 0.2, "min_tokens": 16},
        {"method": "streamingllm"},
    ],
    ids=lambda options: options["method"],
)
def test_the_answers_of_other_methods_stay(stored, greedy, loads, options):
    llm = stored(options, OWN)
    expected = greedy(llm, random_prompts(LENGTHS), NEW_TOKENS)
    forget_all(llm)
    parameters = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    found = llm.generate(random_prompts(LENGTHS), parameters, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in found] == expected
    assert [output.num_cached_tokens for output in found] == [n // 32 * 32 for n in LENGTHS]
    assert not loads, "they keep nothing beside the cache"


def test_an_audit_knows_the_values_that_were_loaded(stored, greedy):
    """Its bound on errors is a multiple of the largest norm of a value."""
    llm = stored({"method": "sketch", "audit_share": 1.0, **PART})
    greedy(llm, random_prompts(LENGTHS), NEW_TOKENS)
    largest = runner_of(llm).specattn_audit.largest_values.clone()
    forget_all(llm)
    runner_of(llm).specattn_audit.largest_values.zero_()
    greedy(llm, random_prompts(LENGTHS), NEW_TOKENS)
    assert torch.equal(runner_of(llm).specattn_audit.largest_values, largest)


def test_an_exact_request_loads_nothing(stored, greedy, loads, answers):
    """What is stored of an approximate answer is not exact."""
    prompts = random_prompts([200])
    llm = stored({"method": "sketch", **PART})
    greedy(llm, prompts, NEW_TOKENS)
    forget_all(llm)
    answers(llm, prompts, NEW_TOKENS, exact=True)
    assert not loads


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("model", ["qwen3", "olmo3"])
@pytest.mark.parametrize("name", ["OffloadingConnector", "SimpleCPUOffloadConnector"])
def test_what_was_offloaded_to_the_cpu_comes_back(engine, family, answers, same, loads, request, name, model, graphs):
    """The first copies keys and values alone, the second whole blocks, with their sketches."""
    audit = None if graphs else request.getfixturevalue("sketch_audit")  # it looks on the host
    connector = {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 28}}
    given = SHAPE | {"target": family(model), "speculative_config": NGRAMS}
    given |= {"enforce_eager": not graphs, "num_gpu_blocks_override": 64}
    prompts, others = (random_prompts(lengths) for lengths in (LENGTHS, [250, 240, 220, 210]))
    llm = engine({"method": "sketch", **PART}, **given)
    answers(llm, prompts, NEW_TOKENS)
    expected = answers(llm, prompts, NEW_TOKENS)
    llm = engine({"method": "sketch", **PART}, kv_transfer_config=connector, **given)
    answers(llm, prompts, NEW_TOKENS)
    for _ in range(2):
        answers(llm, others, NEW_TOKENS)  # the connector works in steps of the engine; and the cache is full then
    forget_all(llm)
    loads.clear()
    found = answers(llm, prompts, NEW_TOKENS)
    assert {n // 32 * 32 for n in LENGTHS} <= set(loads)
    assert all(same(*pair) for pair in zip(expected, found, strict=True))
    for _ in range(3):  # prompts that push one another out of the cache
        mixed = answers(llm, [*prompts, *others], NEW_TOKENS)
        # What is searched is the audit's to say. Numbers that are rounded otherwise may choose other tokens.
        assert all(same(*pair, 0.3) for pair in zip(expected, mixed[: len(prompts)], strict=True))
    assert graphs or audit.pruned > 0
