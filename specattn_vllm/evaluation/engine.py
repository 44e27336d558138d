"""One setting in one engine, in this process: forced through the documents, then free from their beginnings."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from tqdm import tqdm

from specattn_vllm.evaluation import kept
from specattn_vllm.evaluation.acceptance import Acceptance
from specattn_vllm.evaluation.forcing import Forcing, ForcingError
from specattn_vllm.evaluation.job import Job
from specattn_vllm.evaluation.peers import attend
from specattn_vllm.evaluation.requests import finished
from specattn_vllm.evaluation.results import DocumentResult, SettingResult
from specattn_vllm.evaluation.scores import Reference, Scores
from specattn_vllm.stats import Counts

RECORDED = 0
"""The document of which a recorder tells what was kept."""


class Run(NamedTuple):
    result: SettingResult
    scores: Scores
    acceptance: Acceptance
    free_tokens: list[list[int]]


def run(job: Job, reference: Path, terminal: TextIO | None = None) -> Run:
    """Measure one setting. The dense one writes its distributions to the folder `reference`, the others read them.
    Progress is shown on `terminal` (default: the standard error stream) if it is one."""
    start = time.perf_counter()
    scores = Scores(len(job.documents), job.positions, Reference(reference, write=job.setting.is_reference))
    acceptance = Acceptance(len(job.documents), job.draft_tokens)
    device = torch.device("cuda" if job.device == "cuda" else "cpu")
    forcing = Forcing(job.batch, job.max_model_len, device)
    with forcing.installed(), engine(job) as llm:
        recorder = None
        if job.record_kept and job.setting.selects:
            [watched] = llm.collective_rpc(kept.watched)
            recorder = kept.KeptRecorder(*watched, job.max_model_len)
        forced = forced_run(llm, job, forcing, scores, acceptance, terminal, recorder)
        free, rounds, tokens = free_run(llm, job, forcing)
        head_size = llm.model_config.get_head_size()
    scores.reference.close()
    setting = job.setting
    result = SettingResult(
        name=setting.name,
        options=setting.options,
        peer=setting.peer,
        other_batches=setting.other_batches,
        lossless=setting.lossless,
        scan_share=setting.scan_share(head_size),
        job_key=job.key,
        seconds=round(time.perf_counter() - start, 1),
        forced=vars(forced),
        free=vars(free),
        documents=[
            DocumentResult(nll=nll.mean(), kl=kl.mean(), agreement=agrees.mean(), rounds=n, sampled_tokens=m, drafts=of)
            for nll, kl, agrees, (n, m), of in zip(
                scores.nll, scores.kl, scores.agrees, rounds, acceptance.results(), strict=True
            )
        ],
        kept=None if recorder is None else recorder.result(RECORDED),
    )
    return Run(result, scores, acceptance, tokens)


@contextmanager
def engine(job: Job) -> Iterator[Any]:
    """The vLLM engine of a job's setting, peers included, and an end to all it holds."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
        raise RuntimeError("VLLM_ENABLE_V1_MULTIPROCESSING has to be 0: the engine must run in this process")
    llm = LLM(**job.engine_arguments())
    try:
        if job.setting.peer is not None:
            llm.collective_rpc(attend.install, args=(job.setting.peer,))
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def forced_run(
    llm: Any, job: Job, forcing: Forcing, scores: Scores, acceptance: Acceptance, terminal: TextIO | None,
    recorder: kept.KeptRecorder | None,
) -> Counts:  # fmt: skip
    """Lead every document through verification; returns what was counted meanwhile.

    The token after the prompt comes from the prompt's own pass, which reads everything: scores begin with the next.
    """
    names = {f"document-{number}": number for number in range(len(job.documents))}
    before = counts(llm)
    with tqdm(total=scores.nll.size, desc=job.setting.name, unit="tok", disable=None, file=terminal) as bar:

        def observe(name: str, position: int, following: torch.Tensor, logits: torch.Tensor, drafts) -> None:
            if recorder is not None and names[name] == RECORDED:
                recorder.add(forcing.slot_of(name), position)
            if drafts is not None:
                acceptance.add(names[name], logits[: drafts.shape[0]], drafts)
            bar.update(scores.add(names[name], position - job.context, following, logits))

        texts = {name: job.documents[number] for name, number in names.items()}
        with forcing.through(texts, observe):
            generate(llm, job, {name: text[: job.context] for name, text in texts.items()}, 1 + job.verified)
    check_complete(scores)
    counted = counts(llm) - before
    if counted.sampled_tokens != counted.rounds * (job.draft_tokens + 1):
        raise ForcingError(f"{counted.rounds} rounds gave {counted.sampled_tokens} tokens: some draft was not accepted")
    return counted


def check_complete(scores: Scores) -> None:
    """Every position has a loss."""
    for without, what in (
        (~scores.seen, "were never verified"),
        (scores.seen & ~np.isfinite(scores.nll), "have logits that are no numbers"),
    ):
        if without.any():
            document, position = np.argwhere(without)[0]
            raise ForcingError(
                f"{without.sum()} of {without.size} positions {what}, the first of them position {position} of "
                f"document {document}"
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
    """So many greedy tokens for each prompt, by name."""
    requests = [(name, prompt, tokens) for name, prompt in prompts.items()]
    return {done.request_id: list(done.outputs[0].token_ids) for done in finished(llm, job, requests)}


def counts(llm: Any) -> Counts:
    [counted] = llm.collective_rpc("specattn_stats")
    return Counts(**counted)
