"""Sampled tokens have the target's own distribution, not only its greedy tokens, where output is exact: of a target
that drafts for itself, and of one that reads everything and is given drafts drawn from the draft's distribution."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

pytestmark = pytest.mark.engine

TOKENS, DRAFTS, TOP_K = 3, 2, 4
# In Triton's interpreter, vLLM's sampling takes most of a second for a request.
REQUESTS, RARE = (1000, 5) if torch.cuda.is_available() else (64, 3)
# A false alarm in ten thousand; the seeds are fixed, so a test that passes keeps passing.
QUANTILE = 3.719


def _distribution(model, prompt: list[int], penalty: float) -> dict[tuple[int, ...], float]:
    """The probability of each outcome, TOKENS tokens, by a model of transformers and the definition of the sampler:
    logits, less the penalty for each time that a token has been generated; the TOP_K largest; softmax."""
    known = {(): 1.0}
    for _ in range(TOKENS):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + list(tokens) for tokens in known])).logits[:, -1]
        longer = {}
        for (tokens, probability), row in zip(known.items(), logits, strict=True):
            for token in set(tokens):
                row[token] -= penalty * tokens.count(token)
            values, ids = row.topk(TOP_K)
            for token, share in zip(ids.tolist(), values.softmax(0).tolist(), strict=True):
                longer[(*tokens, token)] = probability * share
        known = longer
    return known


def _misfit(seen: Counter, expected: dict[tuple[int, ...], float]) -> tuple[float, float]:
    """The chi-square statistic of a sample, and the value that it exceeds by chance once in ten thousand.

    Outcomes expected fewer than RARE times count as one.
    """
    total, cells, rare = seen.total(), [], [0.0, 0.0]
    for outcome, probability in expected.items():
        if probability * total >= RARE:
            cells.append((seen[outcome], probability * total))
        else:
            rare = [rare[0] + seen[outcome], rare[1] + probability * total]
    cells.append(rare)
    freedom = len(cells) - 1
    assert freedom >= 4 and rare[1] > RARE, "too few outcomes to tell distributions apart: this needs another prompt"
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    # Wilson and Hilferty's approximation.
    return statistic, freedom * (1 - 2 / (9 * freedom) + QUANTILE * math.sqrt(2 / (9 * freedom))) ** 3


def _sample(llm, prompt: list[int], penalty: float) -> Counter:
    from vllm import SamplingParams

    each = [
        SamplingParams(
            temperature=1.0,
            top_k=TOP_K,
            frequency_penalty=penalty,
            seed=seed,
            max_tokens=TOKENS,
            ignore_eos=True,
            detokenize=False,
        )
        for seed in range(REQUESTS)
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt}] * REQUESTS, each, use_tqdm=False)
    return Counter(tuple(output.outputs[0].token_ids) for output in outputs)


@pytest.fixture(scope="module")
def cases(prompts, demo_pair):
    """[(prompt, penalty, probabilities of outcomes)]: code as it is, and code that ends in a token said 17 times, on
    which a penalty for repetition acts."""
    from transformers import LlamaForCausalLM

    # One token behind a whole number of blocks, so that the prefix cache spares prompts.
    ids = prompts([321] * 16)[2]["prompt_token_ids"]
    model = LlamaForCausalLM.from_pretrained(demo_pair[0], dtype=torch.float32)
    given = [(ids, 0.0), (ids[:305] + 16 * ids[304:305], 2.0)]
    return [(prompt, penalty, _distribution(model, prompt, penalty)) for prompt, penalty in given]


VEGAS = {"method": "vegas", "ratio": 0.1, "min_tokens": 0, "sink_tokens": 1, "recent_tokens": 4}


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        pytest.param(VEGAS, "greedy", id="vegas"),
        pytest.param({"method": "sketch", "ratio": 1.0}, "probabilistic", id="sketch, drafts drawn"),
    ],
)
def test_the_first_three_tokens_have_the_target_s_distribution(options, sampling, engine, demo_pair, cases, counts):
    """With a penalty, too, which depends on what was accepted before in the same round."""
    speculation = {
        "method": "draft_model",
        "model": demo_pair[0 if options["method"] == "vegas" else 1],
        "num_speculative_tokens": DRAFTS,
        "draft_sample_method": sampling,
    }
    shape = {"max_num_seqs": 64, "max_model_len": 512, "block_size": 16}
    llm = engine(options, speculative_config=speculation, **shape)
    for prompt, penalty, expected in cases:
        before = counts(llm)
        seen = _sample(llm, prompt, penalty)
        assert seen.keys() <= expected.keys()
        statistic, threshold = _misfit(seen, expected)
        assert statistic < threshold, f"penalty {penalty}"
        # Some drafts were accepted and some rejected, or nothing was put to the test.
        assert 1.1 < (counts(llm) - before).acceptance_length < DRAFTS + 0.9
