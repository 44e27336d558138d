"""Architectures that people serve: exact requests get plain decoding's tokens, and the others what a sketch chooses."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._pytree import tree_leaves
from vllm import SamplingParams

from specattn_vllm.backend.target_choice import target_layers
from specattn_vllm.doctor.sizes import sizes
from specattn_vllm.options import SpecAttnOptions

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

VOCABULARY = 512
NEW_TOKENS = 16
SHAPE = {"skip_tokenizer_init": True, "max_model_len": 512, "max_num_batched_tokens": 256, "max_num_seqs": 4}
NGRAMS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
OPTIONS = {"method": "sketch", "ratio": 0.2, "min_tokens": 40, "recent_tokens": 16, "crossover_tokens": 0}

# Layers that see all of the context; the others have a sliding window or linear attention, and are vLLM's own.
FULL = {"olmo3": 2, "gemma2": 2, "gemma3": 2, "cohere2": 2, "exaone4": 2, "gpt-oss": 3, "granite": 2}
# The same of hybrids, and how many keep a state.
HYBRID = {
    "qwen3-next": (2, 2),
    "qwen3.5": (2, 2),
    "nemotron-h": (2, 2),
    "granite4": (2, 2),
    "falcon-h1": (2, 2),
    "lfm2": (2, 3),
}
FULL |= {name: full for name, (full, _) in HYBRID.items()}
# Llama is what all other tests have.
LARGE_HEADS = ("gemma", "nemotron", "gemma2", "gemma3")
FAMILIES = ["gemma", "phi3-mini", "nemotron", "qwen2", "qwen3", "qwen3-moe", "mistral", "phi", "glm4", "olmo2", *FULL]


@pytest.fixture
def random_prompts():
    generator = torch.Generator().manual_seed(0)
    lengths = [9, 127, 128, 200, 260]
    return [{"prompt_token_ids": torch.randint(2, VOCABULARY, (n,), generator=generator).tolist()} for n in lengths]


@pytest.fixture
def of_family(family):
    """of_family(name) -> arguments of an engine for it, and how far log-probabilities may be apart; None: as usual.
    The sketch's kernels have no room for large heads in float32."""

    def arguments(name: str) -> tuple[dict, float | None]:
        if name == "qwen3.5":
            pytest.importorskip("torchvision", reason="vLLM's file of Qwen3.5 needs torchvision", exc_type=ImportError)
        if name in ("qwen3-next", "qwen3.5"):  # vLLM's linear attention for CPUs takes bfloat16 alone, and rounds more
            # What vLLM takes for itself on some GPUs needs FlashInfer.
            return {"target": family(name), "dtype": "bfloat16", "gdn_prefill_backend": "triton", **SHAPE}, 0.3
        if name in HYBRID and not torch.cuda.is_available():
            # vLLM's scan for CPUs ends in an IndexError where it keeps a state in the middle of a prompt's chunk.
            return {"target": family(name), "enable_prefix_caching": False, **SHAPE}, None
        if name in LARGE_HEADS and torch.cuda.is_available():
            return {"target": family(name), "dtype": "bfloat16", **SHAPE}, 0.15
        return {"target": family(name), **SHAPE}, None

    return arguments


def test_a_draft_model_beside_layers_with_a_window(
    family, tiny_model, engine, random_prompts, counts, sketch_audit, answers, same
):
    """Target and draft choose, each in layers of its own kind of cache."""
    plain = answers(engine(None, target=family("olmo3"), **SHAPE), random_prompts, NEW_TOKENS)
    draft = {"method": "draft_model", "model": tiny_model("draft_model"), "num_speculative_tokens": 3}
    llm = engine(OPTIONS, target=family("olmo3"), speculative_config=draft, **SHAPE)
    assert all(map(same, plain, answers(llm, random_prompts, NEW_TOKENS, exact=True)))
    answers(llm, random_prompts, NEW_TOKENS)
    assert sketch_audit.pruned > 20 and sketch_audit.followed > 20
    seen = counts(llm)
    assert 0 < seen.kv_fraction < 1 and 0 < seen.draft_kv_fraction < 1


def test_centres_are_measured_with_the_layers_that_have_a_window(family, engine, monkeypatch):
    from specattn_vllm.sketch import centre

    def centres() -> torch.Tensor:
        llm = engine(OPTIONS, target=family("olmo3"), speculative_config=None, **SHAPE)
        [runner] = llm.llm_engine.collective_rpc(lambda worker: [worker.model_runner])[0]
        choices = [layer.impl.choice for layer in target_layers(runner).values()]
        return torch.stack([choice.centre for choice in choices])

    first = centres()
    assert first.isfinite().all() and first.abs().amax((1, 2)).min() > 0.01
    assert torch.equal(first, centres())

    def attends_to_nothing(layer, module, query, key, value, kv_cache, attn_metadata, output, **scales):
        return output.fill_(0)

    monkeypatch.setattr(centre, "_attend_in_window", attends_to_nothing)
    assert ((first - centres()).abs().amax((1, 2)) > 0.01).all()


def test_all_methods_serve_another_head_size(family, engine, random_prompts, answers, same):
    """Each reads everything, or is lossless."""
    target = family("phi3-mini")
    plain = answers(engine(None, target=target, **SHAPE), random_prompts, NEW_TOKENS)
    for options in (
        {"method": "dense", "sparse_draft": True, "ratio": 0.2},
        {"method": "specattn", "top_p": 1.0, "layer_map": "uniform"},
        {"method": "vegas", "ratio": 0.2},
    ):
        llm = engine(options, target=target, draft=target, num_speculative_tokens=3, **SHAPE)
        found = answers(llm, random_prompts, NEW_TOKENS)
        assert all(map(same, plain, found)), options["method"]


LONG = ("qwen2", "mistral", "phi", "glm4", "olmo2", "granite", "exaone4", "cohere2", "granite4")
"""Those whose kind of layers another one has too."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in LONG else ()) for name in FAMILIES]
)
def test_it_is_served(name, of_family, engine, random_prompts, counts, sketch_audit, answers, same):
    arguments, close = of_family(name)
    plain = answers(engine(None, **arguments), random_prompts, NEW_TOKENS)
    # vLLM's linear attention for CPUs is inexact where drafts are rejected: see the next test.
    speculation = None if name in HYBRID else NGRAMS
    assert len({token for tokens, _ in plain for token in tokens}) > 4  # else every mistake would look right
    llm = engine(OPTIONS, speculative_config=speculation, **arguments)
    exact = answers(llm, random_prompts, NEW_TOKENS, exact=True)
    assert sketch_audit.pruned == 0
    for expected, found in zip(plain, exact, strict=True):
        assert same(expected, found, close)
    answers(llm, random_prompts, NEW_TOKENS)
    assert sketch_audit.pruned > 20
    seen = counts(llm)
    assert 0 < seen.sparse_rows < seen.verify_rows
    [runner] = llm.llm_engine.collective_rpc(lambda worker: [worker.model_runner])[0]
    assert runner.specattn_chooser.shape.layers == FULL.get(name, 3)
    told = sizes(runner.vllm_config, SpecAttnOptions.parse(OPTIONS))
    assert told["buffers"] == runner.specattn_chooser.nbytes
    assert told["stateful_layers"] == HYBRID.get(name, (0, 0))[1]
    cached = runner.kv_cache_config
    if name in HYBRID:
        of_a_block = cached.kv_cache_tensors[0].size // cached.num_blocks  # all of them lie in this memory
        specs = [group.kv_cache_spec for group in cached.kv_cache_groups]
        blocks = sum(math.ceil(s.max_memory_usage_bytes(runner.vllm_config) / s.page_size_bytes) for s in specs)
        rest = blocks * of_a_block - told["kv_per_token"] * SHAPE["max_model_len"] - told["kv_in_states"]
        # Blocks of GPUs hold other numbers of tokens, and the last one of each kind may be full in part.
        assert 0 <= rest < len(specs) * of_a_block if torch.cuda.is_available() else rest == 0
    for layer in target_layers(runner).values():
        cache, layout = layer.kv_cache, layer.impl.choice.sketch.layout
        pages = cache.stride(0) * cache.element_size() / (cache.shape[2] * cache.shape[1] * layout.kv_bytes)
        # Room for the sketch, and little more; sliding windows' pages are as large.
        room = math.ceil(layout.block_size * layout.token_bytes / layout.kv_bytes) / layout.block_size
        assert 1 < pages < 1.01 + room


def test_a_soft_cap_in_what_is_read_and_in_audits(of_family, engine, random_prompts, counts, answers, same):
    """Nearly all is listed and read, so it is nearly plain decoding, and audits find nearly no loss."""
    arguments, _ = of_family("gemma2")
    plain = answers(engine(None, **arguments), random_prompts, NEW_TOKENS)
    llm = engine(OPTIONS | {"ratio": 0.98, "audit_share": 1.0}, speculative_config=NGRAMS, **arguments)
    found = answers(llm, random_prompts, NEW_TOKENS)
    assert counts(llm).sparse_rows > 20
    assert all(map(same, plain, found, [0.1] * len(plain)))
    [report] = llm.collective_rpc("specattn_audit")
    assert all(of["pairs"] and of["retained_mean"] == pytest.approx(0.98, abs=0.02) for of in report.values())


@pytest.fixture
def stock_speculates():
    """What the plugin mends of the interpreter before it speculates, for stock vLLM."""
    from specattn_vllm.cpu_runner import interpreter

    if not torch.cuda.is_available():
        interpreter.accept_integer_masks()
        interpreter.argmax_of_nan()


def test_a_hybrid_with_drafts_and_cached_prefixes(
    of_family, engine, random_prompts, counts, sketch_audit, answers, same, stock_speculates
):
    """Beside stock vLLM with the same drafts. Whatever prompts find in the cache, the codes of its keys are there."""
    arguments, close = of_family("qwen3-next")
    arguments = {"speculative_config": NGRAMS} | arguments
    stock = answers(engine(None, **arguments), random_prompts, NEW_TOKENS)
    # Dense for their length, and not because they ask for it: those read no cached prefixes.
    llm = engine(OPTIONS | {"min_tokens": SHAPE["max_model_len"]}, **arguments)
    for _ in range(2):
        assert all(map(same, stock, answers(llm, random_prompts, NEW_TOKENS), [close] * 5))
    found_in_the_cache(llm, random_prompts)
    assert sketch_audit.pruned == 0
    for cache in ("auto", "fp8"):
        llm = engine(OPTIONS, kv_cache_dtype=cache, **arguments)
        exact = answers(llm, random_prompts, NEW_TOKENS, exact=True)
        assert sketch_audit.pruned == 0
        assert cache == "fp8" or all(map(same, stock, exact, [close] * 5))
        answers(llm, random_prompts, NEW_TOKENS)
        found_in_the_cache(llm, random_prompts)
        answers(llm, random_prompts, NEW_TOKENS)
        assert sketch_audit.pruned > 20
        sketch_audit.pruned = 0
        assert 0 < counts(llm).kv_fraction < 1


def test_blocks_that_prompts_of_a_hybrid_share_in_part(of_family, engine, sketch_audit, answers):
    """vLLM copies such a block without what is behind its keys and values."""
    arguments, _ = of_family("qwen3-next")
    llm = engine(OPTIONS, speculative_config=None, prefix_match_unit=16, **arguments)
    common = torch.randint(2, 500, (400,), generator=torch.Generator().manual_seed(5)).tolist()
    for tail in ([], [7, 8, 9, 10, 11], [17, 18, 19]):
        before = sketch_audit.pruned
        answers(llm, [{"prompt_token_ids": common + tail}], NEW_TOKENS)
        assert sketch_audit.pruned > before


def found_in_the_cache(llm, prompts) -> None:
    [found] = llm.generate(prompts[-1:], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    assert found.num_cached_tokens > 0


def test_the_last_token_of_a_hybrid_s_prompt_reads_everything(of_family, engine, counts, sketch_audit, answers):
    """Alone in a chunk it may run as a decode in layers of linear attention."""
    arguments, _ = of_family("qwen3-next")
    llm = engine(OPTIONS, speculative_config=None, **arguments)
    length, generator = SHAPE["max_num_batched_tokens"] + 1, torch.Generator().manual_seed(0)
    prompt = {"prompt_token_ids": torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()}
    answers(llm, [prompt], 1)
    seen = counts(llm)
    assert (seen.prefill_rows, seen.verify_rows, sketch_audit.pruned) == (2, 0, 0)
    answers(llm, [prompt], 5)
    assert counts(llm).verify_rows == 4 and sketch_audit.pruned > 0


@pytest.mark.long
def test_a_hybrid_drafts_with_its_own_module(of_family, engine, random_prompts, counts, sketch_audit, answers):
    """Multi-token prediction, of random weights: each round runs the module, and what it drafts is rejected."""
    arguments, _ = of_family("qwen3-next")
    spec = {"method": "mtp", "num_speculative_tokens": 2}
    llm = engine(OPTIONS, speculative_config=spec, load_format="dummy", **arguments)
    answers(llm, random_prompts, NEW_TOKENS)
    seen = counts(llm)
    assert sketch_audit.pruned > 20 and seen.rounds == len(random_prompts) * (NEW_TOKENS - 1)


def test_pages_of_a_hybrid_held_states_before(of_family, engine, random_prompts, sketch_audit, answers, same):
    """A page that held a float32 state is no sensible number as keys and values: not even where masks hide it."""
    arguments, close = of_family("qwen3-next")
    llm = engine(OPTIONS, speculative_config=None, enable_prefix_caching=False, **arguments)
    clean = answers(llm, random_prompts, NEW_TOKENS), answers(llm, random_prompts, NEW_TOKENS, exact=True)
    [runner] = llm.llm_engine.collective_rpc(lambda worker: [worker.model_runner])[0]
    for layer in runner.vllm_config.compilation_config.static_forward_context.values():
        for cache in tree_leaves(getattr(layer, "kv_cache", [])):  # a tensor, or those of one state
            torch.empty(0, dtype=torch.uint8, device=cache.device).set_(cache.untyped_storage()).fill_(0xFF)
    assert all(layer.kv_cache.isnan().all() for layer in target_layers(runner).values())
    sketch_audit.pruned = 0
    sparse, exact = answers(llm, random_prompts, NEW_TOKENS), answers(llm, random_prompts, NEW_TOKENS, exact=True)
    assert sketch_audit.pruned > 20
    for expected, found in zip(clean[0] + clean[1], sparse + exact, strict=True):
        assert same(expected, found, close)
