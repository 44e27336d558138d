"""A target that drafts for itself: the tokens of plain decoding, whatever it reads while it drafts."""

import pytest

pytestmark = pytest.mark.engine

LENGTHS = [5, 127, 129, 300, 1000, 2500, 4000]
NEW_TOKENS = 24
OPTIONS = {"ratio": 0.1, "min_tokens": 32, "recent_tokens": 16}


@pytest.fixture(scope="module")
def plain_tokens():
    """Greedy tokens of stock vLLM without speculation, kept between the tests of this file."""
    return {}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"method": "vegas"}, id="vegas"),
        pytest.param({"method": "vegas", "per_kv_head": True, "dilation": 5}, id="vegas-per_head-dilation"),
        pytest.param({"method": "vegas", "rule": "top_p", "top_p": 0.8}, id="vegas-top_p"),
        pytest.param({"method": "streamingllm"}, id="streamingllm"),
    ],
)
def test_greedy_tokens_equal_plain_decoding(options, plain_tokens, engine, greedy, prompts, counts):
    if not plain_tokens:
        plain_tokens["tokens"] = greedy(engine(None), prompts(LENGTHS), NEW_TOKENS)
    llm = engine(OPTIONS | options, max_num_batched_tokens=512)
    assert greedy(llm, prompts(LENGTHS), NEW_TOKENS) == plain_tokens["tokens"]
    seen = counts(llm)
    assert seen.acceptance_length > 2
    assert 0 < seen.draft_kv_read < 0.5 * seen.draft_kv_full


def test_reading_everything_every_draft_is_accepted(engine, greedy, prompts, counts):
    """Of the same weights and the same cache: what is rejected then is our doing."""
    llm = engine({"method": "vegas", "ratio": 1.0})
    greedy(llm, prompts([40, 300, 1000, 2500]), 41)
    seen = counts(llm)
    assert (seen.acceptance_length - 1) / 4 >= 0.98
    assert seen.draft_kv_read == seen.draft_kv_full > 0
