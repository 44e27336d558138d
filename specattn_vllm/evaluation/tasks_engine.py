"""One setting in one engine, in this process: answers prompts greedily."""

from __future__ import annotations

import time
from typing import TextIO

from tqdm import tqdm

from specattn_vllm.evaluation.engine import counts, engine
from specattn_vllm.evaluation.requests import finished
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
    requests = [(str(number), sample.prompt, sample.answer_tokens) for number, sample in enumerate(job.samples)]
    made = {}
    with tqdm(total=len(requests), desc=job.setting.name, unit="prompt", disable=None, file=terminal) as bar:
        for output in finished(llm, job, requests):
            made[int(output.request_id)] = list(output.outputs[0].token_ids)
            bar.update()
    return [made[number] for number in range(len(requests))]
