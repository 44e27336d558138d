"""Requests to an engine, as many at a time as its KV cache holds up to their ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from specattn_vllm.evaluation.job import Job


class CacheTooSmallError(RuntimeError):
    """The KV cache does not hold one request."""


def finished(llm: Any, job: Job, requests: Iterable[tuple[str, list[int], int]]) -> Iterator[Any]:
    """vLLM's output of each request as soon as it is done. Of requests, (name, prompt, greedy tokens)."""
    from vllm import SamplingParams

    core, waiting, running, most = llm.llm_engine, list(requests)[::-1], 0, at_a_time(llm, job)
    while waiting or running:
        while waiting and running < most:
            name, prompt, tokens = waiting.pop()
            parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            core.add_request(name, {"prompt_token_ids": prompt}, parameters)
            running += 1
        for output in core.step():
            if output.finished:
                running -= 1
                yield output


def at_a_time(llm: Any, job: Job) -> int:
    """How many the cache holds. With more, vLLM takes a request's place away and lets it come back with all its tokens
    as its prompt: the token after it is not verified, and what pruned passes had left in the cache is replaced by what
    a dense one leaves."""
    cache = llm.llm_engine.vllm_config.cache_config
    # One block is vLLM's own.
    held = (cache.num_gpu_blocks - 1) // -(-job.max_model_len // cache.block_size)
    if held < 1:
        raise CacheTooSmallError(
            f"the KV cache has {cache.num_gpu_blocks} blocks of {cache.block_size} tokens, which do not hold one "
            f"request of {job.max_model_len}: give it more memory (--engine-argument gpu_memory_utilization=...)"
        )
    if held < job.batch:
        print(f"{job.setting.name}: the KV cache holds {held} requests at a time, not --batch {job.batch}", flush=True)
    return min(held, job.batch)
