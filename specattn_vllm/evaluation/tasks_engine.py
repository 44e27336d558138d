"""One setting in one engine, in this process: answers prompts greedily."""

from __future__ import annotations

import time
from typing import TextIO

from tqdm import tqdm

from specattn_vllm.evaluation.engine import counts, engine
from specattn_vllm.evaluation.tasks_schema import TaskJob, TaskResult


def run(job: TaskJob, terminal: TextIO | None = None) -> TaskResult:
    """Progress is shown on `terminal` (default: the standard error stream) if it is one."""
    start = time.perf_counter()
    with engine(job) as llm:
        before = counts(llm)
        answers = answer(llm, job, terminal)
        counted = counts(llm) - before
        head_size = llm.model_config.get_head_size()
    scores = [sample.score(made) for sample, made in zip(job.samples, answers, strict=True)]
    return TaskResult.of(job, start, head_size, counts=vars(counted), samples=scores)


def answer(llm, job: TaskJob, terminal: TextIO | None) -> list[list[int]]:
    """Greedy token ids for each sample, as many as its longest answer has."""
    from vllm import SamplingParams

    core, made = llm.llm_engine, {}
    for number, sample in enumerate(job.samples):
        parameters = SamplingParams(temperature=0, max_tokens=sample.answer_tokens, ignore_eos=True, detokenize=False)
        core.add_request(str(number), {"prompt_token_ids": sample.prompt}, parameters)
    with tqdm(total=len(job.samples), desc=job.setting.name, unit="prompt", disable=None, file=terminal) as bar:
        while core.has_unfinished_requests():
            for output in core.step():
                if output.finished:
                    made[int(output.request_id)] = list(output.outputs[0].token_ids)
                    bar.update()
    return [made[number] for number in range(len(job.samples))]
