"""Greedy answers with their log-probabilities, and whether those of two engines agree."""

from __future__ import annotations

import torch
from vllm import SamplingParams

Answer = tuple[list[int], list[float]]
"""Tokens, and the log-probability of each."""

CLOSE = 1e-2 if torch.cuda.is_available() else 2e-4
"""How far log-probabilities of two backends may be apart, which add up in another order. On a GPU, vLLM's attention
rounds factors of products in float32 to 11 bits (TF32). Ours does not: tests/kernels compares it with a reference."""


def answers(llm, prompts, n: int, *, exact: bool = False, **more) -> list[Answer]:
    """n greedy tokens for each prompt. more: arguments of `generate`."""
    parameters = SamplingParams(
        temperature=0,
        max_tokens=n,
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
        extra_args={"specattn": "exact"} if exact else None,
    )
    found = []
    for output in llm.generate(prompts, parameters, use_tqdm=False, **more):
        [one] = output.outputs
        steps = zip(one.logprobs, one.token_ids, strict=True)
        found.append((list(one.token_ids), [step[token].logprob for step, token in steps]))
    return found


def same(expected: Answer, found: Answer, close: float | None = None) -> bool:
    """Whether tokens and log-probabilities agree, up to a token that is as likely as another. close: how far
    log-probabilities may be apart; None: CLOSE."""
    for ours, theirs, logprob, other in zip(*(found[0], expected[0], found[1], expected[1]), strict=True):
        if abs(logprob - other) > (close or CLOSE):
            print(f"token {ours} (expected: {theirs}) has {logprob:.5f} in the place of {other:.5f}")
            return False
        if ours != theirs:
            return True
    return True
