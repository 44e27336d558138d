"""One setting in one engine: forced through the documents, then free from their beginnings. As a program,

    python -m specattn_vllm.evaluation.engine JOB RESULT REFERENCE

with the job as a JSON file, leaves the result as another, or `{"failed": "why"}`.
"""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from specattn_vllm.causes import summary
from specattn_vllm.evaluation import baselines
from specattn_vllm.evaluation.forcing import Forcing, ForcingError
from specattn_vllm.evaluation.job import Job, verified_tokens
from specattn_vllm.evaluation.results import DocumentResult, SettingResult
from specattn_vllm.evaluation.scores import Acceptance, Scores
from specattn_vllm.stats import Counts
from specattn_vllm.tools.engines import end_with_the_parent
from specattn_vllm.tools.outputs import write_json


class CacheTooSmallError(RuntimeError):
    """The KV cache does not hold one request."""


class Run(NamedTuple):
    result: SettingResult
    scores: Scores
    acceptance: Acceptance
    free_tokens: list[list[int]]


def run(job: Job, reference: Path) -> Run:
    """Measure one setting. The dense one writes its distributions to the folder `reference`, the others read them."""
    start = time.perf_counter()
    scores = Scores(len(job.documents), job.positions, reference, write=job.setting.is_reference)
    acceptance = Acceptance(len(job.documents))
    device = torch.device("cuda" if job.device == "cuda" else "cpu")
    forcing = Forcing(job.batch, job.max_model_len, device)
    with forcing.installed(), engine(job) as llm:
        forced = forced_run(llm, job, forcing, scores, acceptance)
        free, rounds, tokens = free_run(llm, job, forcing)
        head_size = llm.model_config.get_head_size()
    scores.close()
    setting = job.setting
    result = SettingResult(
        **setting.model_dump(),
        lossless=setting.lossless,
        scan_share=setting.scan_share(head_size),
        job_key=job.key,
        seconds=round(time.perf_counter() - start, 1),
        forced=vars(forced),
        free=vars(free),
        documents=[
            DocumentResult(nll=nll, kl=kl, agreement=agreement, rounds=n, sampled_tokens=m, drafts=of)
            for (nll, kl, agreement), (n, m), of in zip(scores.means(), rounds, acceptance.results(), strict=True)
        ],
    )
    return Run(result, scores, acceptance, tokens)


@contextmanager
def engine(job: Job) -> Iterator[Any]:
    """The vLLM engine of a job's setting, baselines included, and an end to all it holds."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
        raise RuntimeError("VLLM_ENABLE_V1_MULTIPROCESSING has to be 0: the engine must run in this process")
    llm = LLM(**job.engine_arguments())
    try:
        if job.setting.baseline is not None:
            llm.collective_rpc(baselines.install, args=(job.setting.baseline,))
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def forced_run(llm: Any, job: Job, forcing: Forcing, scores: Scores, acceptance: Acceptance) -> Counts:
    """Lead every document through verification; returns what was counted meanwhile.

    The token after the prompt comes from the prompt's own pass, which reads everything: scores begin with the next.
    """
    names = {f"document-{number}": number for number in range(len(job.documents))}
    before = counts(llm)
    with tqdm(total=scores.nll.size, desc=job.name, unit="tok", mininterval=5) as bar:

        def observe(name: str, position: int, following: torch.Tensor, logits: torch.Tensor, drafts) -> None:
            if drafts is not None:
                acceptance.add(names[name], logits[: drafts.shape[0]], drafts)
            bar.update(scores.add(names[name], position - job.context, following, logits))

        texts = {name: job.documents[number] for name, number in names.items()}
        with forcing.through(texts, observe):
            generate(
                llm,
                job,
                {name: text[: job.context] for name, text in texts.items()},
                1 + verified_tokens(job.positions, job.draft_tokens),
            )
    check_complete(scores)
    counted = counts(llm) - before
    if counted.sampled_tokens != counted.rounds * (job.draft_tokens + 1):
        raise ForcingError(f"{counted.rounds} rounds gave {counted.sampled_tokens} tokens: some draft was not accepted")
    return counted


def check_complete(scores: Scores) -> None:
    """Every position has a loss."""
    without = ~np.isfinite(scores.nll)
    if without.any():
        document, position = np.argwhere(without)[0]
        raise ForcingError(
            f"{without.sum()} of {without.size} positions were never verified, or have logits that are no numbers, the "
            f"first of them position {position} of document {document}"
        )


def free_run(llm: Any, job: Job, forcing: Forcing) -> tuple[Counts, list[list[int]], list[list[int]]]:
    """Greedy generation from the same prompts, drafts accepted as they deserve: what was counted meanwhile, rounds and
    their tokens for each document, and all tokens."""
    before = counts(llm)
    prompts = {f"free-{number}": text[: job.context] for number, text in enumerate(job.documents)}
    with forcing.counting() as counted:
        tokens = generate(llm, job, prompts, job.free_tokens)
    total, rounds = counts(llm) - before, [counted[name] for name in prompts]
    if [total.rounds, total.sampled_tokens] != [sum(column) for column in zip(*rounds, strict=True)]:
        raise ForcingError(
            f"{total.rounds} rounds gave {total.sampled_tokens} tokens, but by document they are {rounds}"
        )
    return total, rounds, [tokens[name] for name in prompts]


def generate(llm: Any, job: Job, prompts: dict[str, list[int]], tokens: int) -> dict[str, list[int]]:
    """So many greedy tokens for each prompt, by name, as many at a time as the KV cache holds up to their ends."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    core, waiting, done, most = llm.llm_engine, list(prompts.items())[::-1], {}, at_a_time(llm, job)
    while len(done) < len(prompts):
        while waiting and len(prompts) - len(waiting) - len(done) < most:
            name, prompt = waiting.pop()
            core.add_request(name, {"prompt_token_ids": prompt}, parameters)
        done |= {of.request_id: list(of.outputs[0].token_ids) for of in core.step() if of.finished}
    return done


def at_a_time(llm: Any, job: Job) -> int:
    """How many requests the cache holds. With more, vLLM takes a request's place away and lets it come back with all
    its tokens as its prompt: the token after it is not verified, and what pruned passes had left in the cache is
    replaced by what a dense one leaves."""
    cache = llm.llm_engine.vllm_config.cache_config
    # One block is vLLM's own.
    held = (cache.num_gpu_blocks - 1) // -(-job.max_model_len // cache.block_size)
    if held < 1:
        raise CacheTooSmallError(
            f"the KV cache has {cache.num_gpu_blocks} blocks of {cache.block_size} tokens, which do not hold one "
            f"request of {job.max_model_len}: give it more memory (--engine-argument gpu_memory_utilization=...)"
        )
    if held < job.batch:
        print(f"{job.name}: the KV cache holds {held} requests at a time, not --batch {job.batch}", flush=True)
    return min(held, job.batch)


def counts(llm: Any) -> Counts:
    [counted] = llm.collective_rpc("specattn_stats")
    return Counts(**counted)


def main(arguments: list[str]) -> None:
    end_with_the_parent()
    given, result, reference = map(Path, arguments)
    job = Job.model_validate_json(given.read_text())
    complete = reference / "complete.json"
    if job.setting.is_reference:
        reference.mkdir(exist_ok=True)
        complete.unlink(missing_ok=True)
    try:
        found = run(job, reference).result.model_dump(mode="json")
        if job.setting.is_reference:
            write_json(complete, {"job_key": job.key})
    except Exception as error:
        traceback.print_exc()  # into the log
        found = {"failed": summary(error)}
    write_json(result, found)


if __name__ == "__main__":
    main(sys.argv[1:])
