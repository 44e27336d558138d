"""One engine, timed in a process of its own: `python -m specattn_vllm.bench.worker JOB RESULT`.

JOB is a JSON file of schema.Job. RESULT is written anew after every cell.

A generation of a batch has three parts: requests join one after the other, all of them decode, and they finish one
after the other. Only the middle is the speed of that batch, so only the middle is timed (`window`).
"""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from specattn_vllm.bench.schema import NO_ROOM, CellResult, EngineResult, Job, OfEngine, Result, Sample
from specattn_vllm.bench.sizes import SETTLING_ROUNDS
from specattn_vllm.causes import summary
from specattn_vllm.tools import models
from specattn_vllm.tools.engines import end_with_the_parent
from specattn_vllm.tools.outputs import write_json


class Step(NamedTuple):
    """What one engine step delivered."""

    time: float
    """Seconds, on any clock."""
    tokens: dict[int, int]
    """Request -> its new tokens."""


class NoWindow(ValueError):
    """The batch never decoded as a whole for long enough."""


def window(steps: Sequence[Step], batch: int, generated: int, round_tokens: int) -> Sample:
    """The stretch in which all `batch` requests decode.

    It begins SETTLING_ROUNDS steps after the one in which the last request got its first token, and ends before any
    request is within two rounds (of at most `round_tokens` tokens) of its end, `generated` tokens: from there on the
    scheduler has less to schedule. Time runs between the deliveries of two steps; the tokens of the first do not count.
    """
    steps = [step for step in steps if step.tokens]
    totals = dict.fromkeys(range(batch), 0)
    joined = end = None
    for index, step in enumerate(steps):
        for request, tokens in step.tokens.items():
            totals[request] += tokens
        if max(totals.values()) > generated - 2 * round_tokens:
            break
        if joined is None and min(totals.values()) > 0:
            joined = index
        end = index
    if joined is None or end <= joined + SETTLING_ROUNDS:
        raise NoWindow(
            f"no stretch in which all {batch} requests decode: raise --output-tokens, or the KV cache holds less than "
            "the batch"
        )
    start = joined + SETTLING_ROUNDS
    timed = steps[start + 1 : end + 1]
    tokens = sum(sum(step.tokens.values()) for step in timed)
    # A request that a step left out had no round in it.
    request_rounds = sum(len(step.tokens) for step in timed)
    return Sample(
        tokens=tokens,
        seconds=steps[end].time - steps[start].time,
        rounds=request_rounds / batch,
        tokens_per_round=tokens / request_rounds,
    )


def is_steady(samples: Sequence[Sample], tolerance: float = 0.03) -> bool:
    """Whether the last two agree in the time of a round, within a share of it."""
    if len(samples) < 2:
        return False
    before, last = (sample.seconds_per_round for sample in samples[-2:])
    return abs(last - before) <= tolerance * before


class AnyWorker:
    """Runs one job, with what was found out about it so far in a file, so that it survives an end by force."""

    def __init__(self, job: OfEngine, result: Result, path: Path) -> None:
        self.job, self.result, self.path = job, result, path

    def run(self) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="specattn-bench-") as made:
                self.result.end(*self.measure(Path(made)))
        except Exception as error:
            traceback.print_exc()  # into the log
            self.result.end("failed", summary(error))
        self.write()

    def write(self) -> None:
        write_json(self.path, self.result.model_dump(mode="json"))

    def measure(self, made: Path) -> tuple[str, str | None]:
        """The job, with models that are made in a folder; status, and reason."""
        raise NotImplementedError


class Worker(AnyWorker):
    def __init__(self, job: Job, path: Path) -> None:
        super().__init__(job, EngineResult(name=job.name, job=job), path)
        self._serial = 0

    def measure(self, made: Path) -> tuple[str, str | None]:
        shape = models.load_shape(self.job.shape)
        from vllm import LLM

        folders = {role: str(path) for role, path in models.model_folders(shape, made).items()}
        self.llm = LLM(**fill_in(self.job.engine_arguments, folders))
        try:
            self._measure_cells(shape.vocab_size)
        finally:
            self.llm.llm_engine.engine_core.shutdown()
        if all(cell.skipped for cell in self.result.cells):  # each says how much it needs
            return "failed", NO_ROOM
        return "ok", None

    def _measure_cells(self, vocab_size: int) -> None:
        import numpy as np

        cache = self.llm.llm_engine.vllm_config.cache_config
        if cache.num_gpu_blocks:
            self.result.kv_cache_tokens = cache.num_gpu_blocks * cache.block_size
        longest = max(cell.prompt_tokens for cell in self.job.cells)
        # Every prompt is the beginning of one of these; the first ids of a vocabulary may have a meaning.
        self.texts = [
            np.random.default_rng([0, request]).integers(16, vocab_size - 16, size=longest).tolist()
            for request in range(max(cell.batch for cell in self.job.cells))
        ]
        for cell in self.job.cells:
            self.result.cells.append(self._measure_cell(cell))
            self.write()

    def _measure_cell(self, cell: CellResult) -> CellResult:
        found = cell.model_copy()
        needed = cell.batch * (cell.prompt_tokens + self.job.generated_tokens)
        room = self.result.kv_cache_tokens
        if room and needed > room:
            more = "set VLLM_CPU_KVCACHE_SPACE (GB)" if self.job.on_cpu else "raise --gpu-memory-utilization"
            there = f"needs a KV cache of {needed:,} tokens, and there is room for {room:,}"
            found.skipped = f"{there}: take fewer requests or shorter prompts (--grid), or {more}"
            return found
        print(f"{cell.name}: prefill", flush=True)
        self.generate(cell, 1, repeat=0)
        warm: list[Sample] = []
        while len(warm) < self.job.max_warmups and not is_steady(warm):
            warm.append(self.time(cell, repeat=-1 - len(warm)))
        found.warmups, found.steady = len(warm), is_steady(warm)
        before = self.counts()
        print(f"{cell.name}: measure", flush=True)
        found.samples = [self.time(cell, repeat) for repeat in range(self.job.repeats)]
        after = self.counts()
        found.counts = {name: after[name] - before[name] for name in after}
        found.summarise()
        return found

    def time(self, cell: CellResult, repeat: int) -> Sample:
        """The timed stretch of one generation."""
        generated = self.job.generated_tokens
        return window(self.generate(cell, generated, repeat), cell.batch, generated, self.job.draft_tokens + 1)

    def generate(self, cell: CellResult, tokens: int, repeat: int) -> list[Step]:
        """Runs the cell's prompts for `tokens` tokens each, step by step."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine, steps, numbers = self.llm.llm_engine, [], {}
        # As vLLM's own throughput benchmark does: hold the scheduler until all requests are there, or the first would
        # be done before the last long prompt has arrived. Level 0 keeps the prefix cache.
        self.llm.sleep(level=0, mode="abort")
        for request in range(cell.batch):
            parameters = SamplingParams(
                temperature=0,
                max_tokens=tokens,
                ignore_eos=True,
                detokenize=False,
                # Decides which drafts are accepted (runner V2): other draws in every repeat, the same in every mode.
                seed=repeat * 1009 + request + 10**6,
                output_kind=RequestOutputKind.DELTA,
            )
            self._serial += 1
            numbers[f"{self._serial}"] = request
            prompt = {"prompt_token_ids": self.texts[request][: cell.prompt_tokens]}
            engine.add_request(f"{self._serial}", prompt, parameters)
        self.llm.wake_up(tags=["scheduling"])
        while engine.has_unfinished_requests():
            new = {numbers[of.request_id]: len(of.outputs[0].token_ids) for of in engine.step()}
            steps.append(Step(time.perf_counter(), {request: count for request, count in new.items() if count}))
        return steps

    def counts(self) -> dict[str, int]:
        """The plugin's counters, which reading them waits for; nothing for stock vLLM."""
        if not self.job.ours:
            return {}
        return self.llm.collective_rpc("specattn_stats")[0] or {}


def fill_in(value: Any, folders: dict[str, str]) -> Any:
    """`value` with '{target}', '{draft}' and '{eagle}' replaced by the models' folders."""
    if isinstance(value, dict):
        return {key: fill_in(item, folders) for key, item in value.items()}
    return folders.get(value[1:-1], value) if isinstance(value, str) and value[:1] == "{" else value


def main(arguments: list[str]) -> None:
    end_with_the_parent()
    job_path, result_path = map(Path, arguments)
    Worker(Job.model_validate_json(job_path.read_text()), result_path).run()


if __name__ == "__main__":
    main(sys.argv[1:])
