"""Requests that ask for exact verification, beside others in the same batch that are pruned."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.engine

LENGTHS = [900, 700, 500, 1100, 300, 800]
PRUNED = {"top_p": 0.3, "min_tokens": 0, "recent_tokens": 16}
NEW_TOKENS = 40


def generate(llm, prompts, exact: set[int]) -> list[list[int]]:
    from vllm import SamplingParams

    parameters = [
        SamplingParams(
            temperature=0,
            max_tokens=NEW_TOKENS,
            ignore_eos=True,
            detokenize=False,
            extra_args={"specattn": "exact"} if i in exact else None,
        )
        for i in range(len(prompts))
    ]
    outputs = llm.generate(prompts, parameters, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_exact_ones_equal_plain_decoding_and_the_others_are_pruned(plain, engine, prompts, counts, audit):
    expected = plain(prompts(LENGTHS), NEW_TOKENS)
    audit.owner.clear()
    # Fewer places than requests: some wait, and take up slots of exact ones.
    llm = engine(PRUNED, max_num_seqs=3)
    tokens = generate(llm, prompts(LENGTHS), exact={0, 2, 5})
    assert [tokens[i] for i in (0, 2, 5)] == [expected[i] for i in (0, 2, 5)]
    # This little of the context changes what comes out.
    assert any(tokens[i] != expected[i] for i in (1, 3, 4))
    by_number = {name.split("-")[0]: rows for name, rows in audit.sparse_rows.items()}
    assert set(by_number) == {"1", "3", "4"}
    assert {name.split("-")[0] for name in audit.dense_rows} >= {"0", "2", "5"}
    seen = counts(llm)
    assert 0 < seen.sparse_rows < seen.verify_rows
    assert seen.stale_rows == 0
    # Told apart from rows without a selection that were to have one.
    dense = {name: rows for name, rows in audit.dense_rows.items() if name.split("-")[0] in "025"}
    assert seen.exact_rows == sum(dense.values()) > 0
    assert seen.no_selection_rows == sum(audit.dense_rows.values())


def test_an_exact_request_that_is_preempted_stays_exact(plain, small_pool, engine, prompts, audit):
    given = prompts(small_pool.lengths)
    expected = plain(given, NEW_TOKENS)
    tokens = generate(engine(PRUNED, **small_pool.arguments), given, exact={0, 1, 2, 3})
    assert audit.preemptions > 0
    assert tokens == expected
    assert audit.sparse_rows == {}
