"""Exact modes give the tokens of plain decoding, one by one, in fp32 with prefix caching and chunked prefill on."""

import pytest

pytestmark = pytest.mark.engine

# 12 prompts of held-out code, more than run at a time: short, around page edges (128 tokens a block), and 4k.
LENGTHS = [5, 64, 127, 128, 129, 255, 256, 511, 800, 1500, 3000, 4090]
# What goes through the same path as top_p=1 needs no prompts of many chunks, whose attention takes most of the time.
SHORTER = LENGTHS[:10]
NEW_TOKENS = 16


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        pytest.param({"method": "dense"}, LENGTHS, id="dense"),
        pytest.param({"method": "specattn", "top_p": 1.0}, LENGTHS, id="top_p=1"),
        # A selection that keeps all of the context must not depend on how the steps are combined.
        pytest.param({"method": "specattn", "top_p": 1.0, "combine": "union"}, SHORTER, id="top_p=1-union"),
        # A table per KV head, each of everything.
        pytest.param({"method": "sts", "ratio": 1.0}, SHORTER, id="sts-ratio=1"),
    ],
)
def test_greedy_tokens_equal_plain_decoding(options, lengths, plain, engine, greedy, prompts, counts):
    given = prompts(LENGTHS)[: len(lengths)]
    expected = plain(given, NEW_TOKENS)
    llm = engine(options)
    assert greedy(llm, given, NEW_TOKENS) == expected
    seen = counts(llm)
    assert seen.acceptance_length > 1.5, "the draft should have been right about something"
    if options["method"] != "dense":
        assert seen.sparse_rows == seen.verify_rows > 0, "every verification went through the page tables"
        assert seen.kv_read == seen.kv_full


def test_pruning_changes_what_is_read_and_little_of_what_is_written(plain, engine, greedy, prompts, counts):
    given = prompts(LENGTHS)
    expected = plain(given, NEW_TOKENS)
    llm = engine({"method": "specattn", "top_p": 0.9})
    tokens = greedy(llm, given, NEW_TOKENS)
    seen = counts(llm)
    assert seen.sparse_rows == seen.verify_rows
    assert seen.kv_fraction < 0.6
    # Approximate, so not equal; but not noise either.
    same = sum(t == e for t, e in zip(tokens, expected, strict=True))
    assert same >= len(LENGTHS) // 3


def test_a_model_drafting_for_itself_is_accepted(engine, greedy, prompts, counts, demo_pair):
    """Draft and target of the same weights agree, except where two logits tie: what is rejected then is our doing."""
    llm = engine({"method": "dense"}, draft=demo_pair[0])
    greedy(llm, prompts([40, 300, 1000, 2500]), 41)
    seen = counts(llm)
    accepted = (seen.acceptance_length - 1) / 4
    assert accepted >= 0.98
