"""Drafters of vLLM's beside methods that ask nothing of them: the target's tokens stay plain decoding's, one by one."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.engine

# Options with which the target's output is exact whoever drafts.
OPTIONS = [
    pytest.param({"method": "dense"}, id="dense"),
    pytest.param({"method": "sketch", "ratio": 1.0}, id="sketch"),
]

# Chunks of prompts beside verifications, a request that waits, contexts around a block's edge.
SHAPE = {"skip_tokenizer_init": True, "max_model_len": 512, "max_num_batched_tokens": 256, "max_num_seqs": 4}
LENGTHS = [9, 127, 128, 200, 260]
NEW_TOKENS = 24
# The first makes room for the one that waits while the others still run.
DIFFERENT = [6, 24, 24, 24, 18]
VOCABULARY = 512
"""That of the models of `tiny_models.py`."""


def _case(name: str, target: str, tokens_a_round: float, **speculation):
    """Those that share a target share its plain tokens, so they run in one process."""
    marks = pytest.mark.xdist_group(f"drafters-{target}")
    return pytest.param(target, speculation, tokens_a_round, id=name, marks=marks)


# Tokens a round are those with vLLM's own attention in all layers (n-grams: with its interpreter mended), so that a
# drafter whose layers we attend for drafts as it should. DFlash is never right: its drafts see no tokens but masks.
DRAFTERS = [
    _case("none", "target", 1.0),
    _case("draft_model", "target", 3.31, method="draft_model", model="draft_model", num_speculative_tokens=4),
    _case("ngram", "target", 1.0, method="ngram", num_speculative_tokens=3, prompt_lookup_max=2, prompt_lookup_min=1),
    _case("eagle", "target", 2.94, method="eagle", model="eagle", num_speculative_tokens=4),
    _case("eagle3", "target", 1.26, method="eagle3", model="eagle3", num_speculative_tokens=2),
    _case("dflash", "target", 1.0, method="dflash", model="dflash", num_speculative_tokens=4),
    _case("dspark", "target", 1.26, method="dspark", model="dspark", num_speculative_tokens=4),
    _case("mtp", "mimo", 2.50, method="mtp", num_speculative_tokens=3),
    _case("mtp-one-token", "mimo", 1.70, method="mtp", num_speculative_tokens=1),
    _case("mtp-modules", "glm", 2.23, method="mtp", num_speculative_tokens=2),
]


@pytest.fixture
def random_prompts():
    import torch

    generator = torch.Generator().manual_seed(0)
    return [{"prompt_token_ids": torch.randint(2, VOCABULARY, (n,), generator=generator).tolist()} for n in LENGTHS]


@pytest.fixture(scope="module")
def known() -> dict[str, list[list[int]]]:
    """Plain decoding's tokens of targets, by name."""
    return {}


@pytest.fixture
def tokens_a_round():
    """tokens_a_round(llm) -> tokens of a verification, on average; 1 without any."""

    def read(llm) -> float:
        values = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
        rounds = values.get("vllm:spec_decode_num_drafts", 0)
        return 1 + values["vllm:spec_decode_num_accepted_tokens"] / rounds if rounds else 1.0

    return read


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("target", "speculation", "expected_tokens"), DRAFTERS)
def test_tokens_equal_plain_decoding(
    options,
    target,
    speculation,
    expected_tokens,
    engine,
    greedy,
    tiny_model,
    random_prompts,
    known,
    tokens_a_round,
    counts,
):
    if target not in known:
        known[target] = greedy(engine(None, target=tiny_model(target), **SHAPE), random_prompts, DIFFERENT)
    if "model" in speculation:
        speculation = speculation | {"model": tiny_model(speculation["model"])}
    llm = engine(
        options, target=tiny_model(target), speculative_config=speculation or None, disable_log_stats=False, **SHAPE
    )
    assert greedy(llm, random_prompts, DIFFERENT) == known[target]
    assert tokens_a_round(llm) == pytest.approx(expected_tokens, rel=0.05)
    # As many rounds as vLLM counts, and the tokens of these.
    seen = counts(llm)
    assert (seen.rounds > 0) == bool(speculation)
    assert max(seen.acceptance_length, 1.0) == pytest.approx(tokens_a_round(llm), rel=0.05)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("target", "speculation", "expected_tokens"), DRAFTERS)
def test_what_is_read_is_chosen_by_the_target_alone(
    target, speculation, expected_tokens, engine, greedy, tiny_model, random_prompts, sketch_audit, counts
):
    """Below ratio 1, whoever drafts: each choice is that of the target's queries over the keys in its own cache."""
    del expected_tokens
    if "model" in speculation:
        speculation = speculation | {"model": tiny_model(speculation["model"])}
    options = {"method": "sketch", "ratio": 0.2, "min_tokens": 40, "recent_tokens": 16}
    llm = engine(options, target=tiny_model(target), speculative_config=speculation or None, **SHAPE)
    greedy(llm, random_prompts, [6, 12, 12, 12, 10])
    assert sketch_audit.pruned > 20
    seen = counts(llm)
    assert 0 < seen.sparse_rows < seen.verify_rows
    assert 0.15 < seen.kv_fraction < 0.6
    if speculation:
        assert seen.rounds > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"method": "dense", "sparse_draft": True}, id="dense"),
        pytest.param({"method": "sketch", "sparse_draft": True, "draft_ratio": 0.2}, id="sketch"),
    ],
)
def test_drafts_are_chosen_by_the_drafting_model_s_own_queries(
    options, engine, greedy, plain, prompts, sketch_audit, counts
):
    """Once a round, and read in all of it; what is verified by everything is plain decoding's."""
    given = prompts([30, 400, 700, 1000])
    if options["method"] != "sketch":
        options = {**options, "ratio": 0.2}
    options = {**options, "min_tokens": 40, "recent_tokens": 16}
    llm = engine(options, max_num_batched_tokens=256, block_size=16)
    tokens, seen = greedy(llm, given, NEW_TOKENS), counts(llm)
    if options["method"] != "sketch":
        assert tokens == plain(given, NEW_TOKENS)
    assert sketch_audit.pruned > 20
    assert sketch_audit.followed > 20
    assert seen.acceptance_length > 2
    assert 0.15 < seen.draft_kv_fraction < 0.5
    assert 0 < seen.draft_kv_sampled < seen.draft_kv_scanned < seen.draft_kv_full


def test_what_rounds_of_one_draft_read_is_counted(engine, greedy, prompts, counts):
    options = {"method": "sketch", "draft_ratio": 0.2, "min_tokens": 40, "recent_tokens": 16}
    llm = engine(options, block_size=16, num_speculative_tokens=1)
    greedy(llm, prompts([400, 700]), 6)
    seen = counts(llm)
    assert 0 < seen.draft_kv_scanned < seen.draft_kv_full
    assert 0.15 < seen.draft_kv_fraction < 0.5


@pytest.mark.parametrize("options", OPTIONS)
def test_n_grams_are_right_about_real_text(options, engine, greedy, plain, prompts, tokens_a_round):
    given = prompts([31, 128, 400, 1000])
    expected = plain(given, NEW_TOKENS)
    spec = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    llm = engine(options, speculative_config=spec, max_model_len=2048, disable_log_stats=False)
    assert greedy(llm, given, NEW_TOKENS) == expected
    assert tokens_a_round(llm) > 1.3
