"""Adapters beside their base model: keys are the adapter's own, and so is what is chosen among them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

VOCABULARY, WIDTH, INNER, LAYERS, RANK = 512, 256, 384, 3, 4
ATTENTION = {"q_proj": (WIDTH, 256), "k_proj": (WIDTH, 128), "v_proj": (WIDTH, 128), "o_proj": (256, WIDTH)}
MLP = {"gate_proj": (WIDTH, INNER), "up_proj": (WIDTH, INNER), "down_proj": (INNER, WIDTH)}
"""What an adapter changes of the model `target` of `tiny_models.py`: name -> width of what goes in, and comes out."""

SHAPE = {
    "skip_tokenizer_init": True,
    "max_model_len": 512,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 4,
    "block_size": 32,
    "enable_lora": True,
    # One more than there are: on a CPU, vLLM gives the last place's adapter to requests without one.
    "max_loras": 3,
    "max_lora_rank": 8,
    "dtype": "float16" if torch.cuda.is_available() else "float32",
}
LENGTHS = [9, 127, 128, 200, 260, 230]
NEW_TOKENS = 16
PART = {"ratio": 0.2, "min_tokens": 32, "recent_tokens": 16, "crossover_tokens": 0}
NGRAMS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
DRAFT = {"method": "draft_model", "num_speculative_tokens": 3}


@pytest.fixture(scope="session")
def adapters(tmp_path_factory):
    """Two adapters with random weights, in the format of peft."""
    made = []
    for seed in (1, 2):
        folder, generator = tmp_path_factory.mktemp("adapter"), torch.Generator().manual_seed(seed)
        parts = {f"self_attn.{name}": size for name, size in ATTENTION.items()}
        parts |= {f"mlp.{name}": size for name, size in MLP.items()}
        weights = {}
        for name, (inside, outside) in ((f"{i}.{name}", size) for i in range(LAYERS) for name, size in parts.items()):
            prefix = f"base_model.model.model.layers.{name}.lora"
            weights[f"{prefix}_A.weight"] = torch.randn(RANK, inside, generator=generator) * inside**-0.5
            weights[f"{prefix}_B.weight"] = torch.randn(outside, RANK, generator=generator) * 0.3
        save_file(weights, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": [*ATTENTION, *MLP]}
        (folder / "adapter_config.json").write_text(json.dumps(config | {"bias": "none"}))
        made.append(str(folder))
    return made


@pytest.fixture
def served(engine, tiny_model):
    """served(options, speculation, **arguments) -> an engine that takes adapters."""

    def make(options, speculation=None, **arguments):
        if speculation is not None:
            # Where drafts are verified, vLLM cannot tell rows of the head apart by adapter.
            arguments["lora_target_modules"] = [*ATTENTION, *MLP]
        if speculation is DRAFT:
            speculation = DRAFT | {"model": tiny_model("draft_model")}
        return engine(options, target=tiny_model("target"), speculative_config=speculation, **SHAPE | arguments)

    return make


@pytest.fixture
def whose(adapters):
    """The base model and two adapters, as requests name them."""
    from vllm.lora.request import LoRARequest

    return [None, *(LoRARequest(f"adapter-{i}", i, path) for i, path in enumerate(adapters, 1))]


@pytest.fixture
def mixed(whose):
    """Prompts, and whose they are: the base model's, the first adapter's, the second's, the base model's, ..."""
    generator = torch.Generator().manual_seed(0)
    prompts = [{"prompt_token_ids": torch.randint(2, VOCABULARY, (n,), generator=generator).tolist()} for n in LENGTHS]
    return prompts, [whose[i % 3] for i in range(len(prompts))]


def outputs(llm, prompts, whose) -> list:
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    return llm.generate(prompts, parameters, lora_request=whose, use_tqdm=False)


@pytest.fixture
def asked(answers):
    """asked(llm, prompts, whose) -> tokens and log-probabilities of each."""
    return lambda llm, prompts, whose, **more: answers(llm, prompts, NEW_TOKENS, lora_request=whose, **more)


@pytest.fixture
def alike(same):
    """alike(expected, found), lists of answers: vLLM's own kernels on GPUs have adapters in 16 bits alone."""
    close = 0.03 if torch.cuda.is_available() else None
    return lambda expected, found: all(same(*pair, close) for pair in zip(expected, found, strict=True))


@pytest.fixture(scope="module")
def known() -> list:
    return []


@pytest.fixture
def plain(known, served, mixed, asked, alike):
    """Stock vLLM's answers to `mixed`, without speculation. Adapters change them."""
    if not known:
        llm = served(None)
        known.extend(asked(llm, *mixed))
        without = asked(llm, mixed[0], None)
        changed = [not alike([one], [other]) for one, other in zip(known, without, strict=True)]
        assert changed == [adapter is not None for adapter in mixed[1]]
    return known


@pytest.mark.parametrize(
    ("options", "speculation"),
    [
        pytest.param({"method": "sketch", "ratio": 1.0}, None, id="sketch"),
        pytest.param({"method": "dense", "sparse_draft": True} | PART, DRAFT, id="dense"),
        pytest.param({"method": "specattn", "top_p": 1.0, "min_tokens": 32}, DRAFT, id="specattn"),
        pytest.param({"method": "sts", "layer_map": "uniform", "top_p": 1.0, "min_tokens": 32}, DRAFT, id="sts"),
    ],
)
def test_adapters_answer_as_in_stock_vllm(options, speculation, served, mixed, plain, asked, alike):
    assert alike(plain, asked(served(options, speculation), *mixed))


@pytest.mark.parametrize("speculation", [None, NGRAMS, DRAFT], ids=["alone", "ngrams", "draft_model"])
def test_what_is_chosen_is_chosen_among_the_keys_of_the_adapter(
    speculation, served, mixed, plain, counts, sketch_audit, asked, alike
):
    llm = served({"method": "sketch"} | PART, speculation)
    assert alike(plain, asked(llm, *mixed, exact=True))
    assert counts(llm).sparse_rows == 0
    asked(llm, *mixed)
    assert sketch_audit.pruned > 20
    seen = counts(llm)
    assert 0 < seen.sparse_rows < seen.verify_rows


def test_the_centre_is_that_of_the_base_model(served, mixed):
    def centres(**arguments) -> torch.Tensor:
        from specattn_vllm.backend.target_choice import target_layers

        llm = served({"method": "sketch"} | PART, **arguments)
        [runner] = llm.llm_engine.collective_rpc(lambda worker: [worker.model_runner])[0]
        return torch.stack([layer.impl.choice.centre for layer in target_layers(runner).values()])

    without = {"enable_lora": False, "max_loras": 1, "max_lora_rank": 16}
    torch.testing.assert_close(centres(), centres(**without))


def test_a_prefix_belongs_to_its_adapter(served, mixed, whose, plain, sketch_audit, asked, alike):
    """One prompt for each of the three in turn. What is cached for one is no start for another."""
    prompt, place = mixed[0][4], 4
    llm = served({"method": "sketch"} | PART)
    cached = [outputs(llm, [prompt], adapter)[0].num_cached_tokens for adapter in whose]
    assert cached == [0, 0, 0]
    before = sketch_audit.pruned
    again = [outputs(llm, [prompt], adapter)[0].num_cached_tokens for adapter in whose]
    assert all(count >= 224 for count in again)
    assert sketch_audit.pruned > before
    # Exact requests after a hit: stock vLLM's tokens, by the adapter's keys in the cache.
    assert alike([plain[place]], asked(llm, [prompt], mixed[1][place], exact=True))
