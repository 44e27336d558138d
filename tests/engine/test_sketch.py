"""Method 'sketch' in whole engines: every step's choice, and every sketch behind it, held against the keys."""

from __future__ import annotations

import pytest
import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

pytestmark = pytest.mark.engine

OPTIONS = {"method": "sketch", "ratio": 0.15, "min_tokens": 96, "recent_tokens": 32}
NEW_TOKENS = 24


@pytest.mark.parametrize(
    ("options", "own"),
    [
        pytest.param({}, {}, id="draft model"),
        pytest.param({"shared_budget": "none", "sketch_bits": 4}, {"speculative_config": None}, id="no speculation"),
        pytest.param({"sketch_bits": 1, "executor": "triton"}, {"speculative_config": None}, id="kernels"),
    ],
)
def test_choices_and_sketches_of_chunked_prompts(options, own, engine, greedy, prompts, counts, sketch_audit):
    llm = engine({**OPTIONS, **options}, max_num_batched_tokens=256, block_size=16, **own)
    # On a CPU the kernels' interpreter takes minutes for what PyTorch takes seconds for.
    interpreted = options.get("executor") == "triton" and not torch.cuda.is_available()
    lengths, tokens = ([30, 300, 600], 6) if interpreted else ([30, 400, 900, 1500], NEW_TOKENS)
    greedy(llm, prompts(lengths), tokens)
    assert sketch_audit.pruned > 20
    seen = counts(llm)
    assert 0 < seen.sparse_rows < seen.verify_rows
    assert 0.1 < seen.kv_fraction < 0.5
    assert 0.5 < seen.kv_scanned / seen.kv_full < 1.0
    # Before that some 500 tokens of each context, or all of a shorter one.
    assert 0.3 < seen.kv_sampled / seen.kv_scanned < 1.0


def test_blocks_that_are_found_again_hold_their_sketch(engine, greedy, prompts, counts, sketch_audit):
    """Prefix hits, and requests that lose their blocks in the middle and come back."""
    llm = engine(OPTIONS, block_size=16, max_num_seqs=4, num_gpu_blocks_override=116, max_model_len=1024)
    batch = prompts([420, 430, 440, 450])
    first = greedy(llm, batch, 40)
    again = greedy(llm, batch[::-1], 40)[::-1]
    assert sketch_audit.pruned > 50
    # Which rows are in a step decides nothing in fp32: the same token follows a prompt, found again or not.
    assert [tokens[0] for tokens in first] == [tokens[0] for tokens in again]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("drafts", [True, False], ids=["EAGLE", "no speculation"])
def test_a_step_is_counted_once_in_however_many_groups_the_layers_are(
    drafts, engine, greedy, tiny_model, counts, sketch_audit, monkeypatch
):
    """vLLM takes layers apart where a drafter's differ from the target's; here each is in a group of its own."""
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec

    try:
        from vllm.v1.core import kv_cache_planning as planning  # vLLM 0.33
    except ImportError:
        from vllm.v1.core import kv_cache_utils as planning

    def one_each(vllm_config, specs):
        return [KVCacheGroupSpec([name], spec) for name, spec in specs.items()]

    speculation = {"method": "eagle", "model": tiny_model("eagle"), "num_speculative_tokens": 3} if drafts else None
    shape = {"target": tiny_model("target"), "speculative_config": speculation, "skip_tokenizer_init": True}
    shape |= {"max_model_len": 512, "block_size": 16, "num_gpu_blocks_override": 600, "enable_prefix_caching": False}
    generator = torch.Generator().manual_seed(0)
    given = [{"prompt_token_ids": torch.randint(2, 512, (n,), generator=generator).tolist()} for n in (300, 30, 400)]
    seen = []
    together = planning.get_kv_cache_groups
    for groups in (together, one_each):
        monkeypatch.setattr(planning, "get_kv_cache_groups", groups)
        llm = engine(OPTIONS, **shape)
        seen.append((greedy(llm, given, NEW_TOKENS), counts(llm)))
    assert sketch_audit.pruned > 20
    assert seen[0] == seen[1]


def test_exact_requests_read_everything_beside_others(engine, prompts, plain, counts, sketch_audit):
    from vllm import SamplingParams

    batch = prompts([700, 700])
    expected = plain(batch, NEW_TOKENS)
    llm = engine({**OPTIONS, "ratio": 0.02, "min_tokens": 36}, block_size=16)
    common = {"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True, "detokenize": False}
    parameters = [SamplingParams(**common, extra_args={"specattn": "exact"}), SamplingParams(**common)]
    outputs = llm.generate(batch, parameters, use_tqdm=False)
    assert list(outputs[0].outputs[0].token_ids) == expected[0]
    seen = counts(llm)
    assert 0 < seen.exact_rows < seen.verify_rows
    assert seen.sparse_rows == seen.verify_rows - seen.exact_rows


def test_batches_below_the_crossover_read_everything(engine, greedy, prompts, plain, counts):
    batch = prompts([700, 300])
    expected = plain(batch, NEW_TOKENS)
    llm = engine({**OPTIONS, "crossover_tokens": 10**6})
    assert greedy(llm, batch, NEW_TOKENS) == expected
    seen = counts(llm)
    assert seen.small_batch_rows == seen.verify_rows > 0
    assert seen.kv_fraction == 1.0
    assert seen.kv_scanned == 0


def test_the_cache_s_budget_pays_for_the_sketch(engine):
    llm = engine(OPTIONS, block_size=16)
    layers = get_layers_from_vllm_config(llm.llm_engine.vllm_config, AttentionLayerBase)
    for name, layer in layers.items():
        cache = layer.kv_cache
        page = cache.shape[1] * cache.shape[2] * cache.shape[3]
        # 18 bytes for each 512 of keys and values in fp32, rounded up to whole keys and values.
        assert cache.stride(0) - page == -(-cache.shape[1] * 16 * 18 // 512) * 128, name


def test_centres_are_measured_and_stay(engine, greedy, prompts):
    llm = engine(OPTIONS)
    layers = get_layers_from_vllm_config(llm.llm_engine.vllm_config, AttentionLayerBase)
    sketches = [layer.impl.choice for layer in layers.values() if layer.impl.choice is not None]
    assert len(sketches) == 6 + 3  # the target's, and the draft's, which drafts by its own
    before = [sketch.centre.clone() for sketch in sketches]
    assert all(float(centre.norm()) > 0.1 for centre in before)
    greedy(llm, prompts([300]), 8)
    assert all(torch.equal(sketch.centre, centre) for sketch, centre in zip(sketches, before, strict=True))
