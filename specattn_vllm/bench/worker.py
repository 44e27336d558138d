"""One engine, timed in a process of its own: `python -m specattn_vllm.bench.worker JOB RESULT EVENTS`.

JOB is a JSON file of schema.Job. RESULT is written anew after every cell, so that what was measured survives an end by
force. EVENTS gets a JSON object a line while it goes on: {"cell": ..., "phase": ...}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from specattn_vllm.bench import timing
from specattn_vllm.bench.schema import NO_ROOM, CellResult, EngineResult, Job, JobCell, Phase, Sample
from specattn_vllm.bench.summary import summarise
from specattn_vllm.causes import told
from specattn_vllm.tools import models
from specattn_vllm.tools.outputs import write_json


class NoRoom(Exception):
    """No cell fits in the KV cache."""


class Worker:
    """The engine of one job, and what was found out about it so far."""

    def __init__(self, job: Job, result_path: Path, events_path: Path) -> None:
        self.job = job
        self.result = EngineResult(name=job.name, status="failed", reason="ended early", job=job, job_key=job.key)
        self._result_path, self._events_path = result_path, events_path
        self._serial = 0

    def run(self) -> None:
        start = time.perf_counter()
        try:
            self._run()
            self.result.status, self.result.reason = "ok", None
        except NoRoom:
            self.result.reason = NO_ROOM  # each cell says how much it needs
        except Exception as error:
            traceback.print_exc()  # into the log
            self.result.reason = told(error)
        self.result.seconds = round(time.perf_counter() - start, 2)
        self.write()

    def write(self) -> None:
        write_json(self._result_path, self.result.model_dump(mode="json"))

    @contextmanager
    def phase(self, name: str, cell: str | None = None) -> Iterator[None]:
        with self._events_path.open("a") as file:
            file.write(json.dumps({"cell": cell, "phase": name}) + "\n")
        start = time.perf_counter()
        try:
            yield
        finally:
            self.result.phases.append(Phase(name=name, cell=cell, seconds=round(time.perf_counter() - start, 3)))

    def _run(self) -> None:
        with tempfile.TemporaryDirectory(prefix="specattn-bench-") as folder:
            shape = models.load_shape(self.job.shape)
            with self.phase("start"):
                from vllm import LLM

                folders = {role: str(path) for role, path in models.model_folders(shape, Path(folder)).items()}
                self.llm = LLM(**fill_in(self.job.engine_arguments, folders))
            try:
                self._measure(shape.vocab_size)
            finally:
                with self.phase("stop"):
                    self.llm.llm_engine.engine_core.shutdown()

    def _measure(self, vocab_size: int) -> None:
        import numpy as np

        cache = self.llm.llm_engine.vllm_config.cache_config
        if cache.num_gpu_blocks:
            self.result.kv_cache_tokens = cache.num_gpu_blocks * cache.block_size
        longest = max(cell.prompt_tokens for cell in self.job.cells)
        # Every prompt is the beginning of one of these; the first ids of a vocabulary may have a meaning.
        self.texts = [
            np.random.default_rng([self.job.seed, request]).integers(16, vocab_size - 16, size=longest).tolist()
            for request in range(max(cell.batch for cell in self.job.cells))
        ]
        for cell in self.job.cells:
            self.result.cells.append(self._measure_cell(cell))
            self.write()
        if all(cell.skipped for cell in self.result.cells):
            raise NoRoom

    def _measure_cell(self, cell: JobCell) -> CellResult:
        found = CellResult(name=cell.name, batch=cell.batch, prompt_tokens=cell.prompt_tokens)
        needed = cell.batch * (cell.prompt_tokens + self.job.generated_tokens)
        room = self.result.kv_cache_tokens
        if room and needed > room:
            each = kv_bytes(self.llm.llm_engine.vllm_config)
            more = "set VLLM_CPU_KVCACHE_SPACE (GB)" if self.job.on_cpu else "raise --gpu-memory-utilization"
            found.skipped = (
                f"needs a KV cache of {needed:,} tokens, about {gigabytes(needed * each)}, and there is room for "
                f"{room:,}, about {gigabytes(room * each)}: take fewer requests or shorter prompts (--grid), or {more}"
            )
            return found
        with self.phase("prefill", cell.name):
            self.generate(cell, 1, repeat=0)
        warm: list[Sample] = []
        with self.phase("warm-up", cell.name):
            while len(warm) < self.job.max_warmups and not timing.is_steady(warm):
                warm.append(self.time(cell, repeat=-1 - len(warm))[0])
        found.warmups, found.steady = len(warm), timing.is_steady(warm)
        before = self.counts()
        with self.phase("measure", cell.name):
            timed = [self.time(cell, repeat=repeat) for repeat in range(self.job.repeats)]
        after = self.counts()
        found.counts = {name: after[name] - before[name] for name in after}
        found.samples = [sample for sample, _ in timed]
        found.cached = round(min(cached for _, cached in timed), 4)
        return summarise(found)

    def time(self, cell: JobCell, repeat: int) -> tuple[Sample, float]:
        """One generation: its timed stretch, and the smallest share of a prompt that was cached."""
        generated = self.job.generated_tokens
        steps, cached = self.generate(cell, generated, repeat)
        sample = timing.window(steps, cell.batch, generated, self.job.draft_tokens + 1)
        return sample, cached / cell.prompt_tokens

    def generate(self, cell: JobCell, tokens: int, repeat: int) -> tuple[list[timing.Step], int]:
        """Runs the cell's prompts for `tokens` tokens each, step by step."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine, steps, cached, numbers = self.llm.llm_engine, [], cell.prompt_tokens, {}
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
                seed=(self.job.seed * 1009 + repeat) * 1009 + request + 10**6,
                output_kind=RequestOutputKind.DELTA,
            )
            self._serial += 1
            numbers[f"{self._serial}"] = request
            prompt = {"prompt_token_ids": self.texts[request][: cell.prompt_tokens]}
            engine.add_request(f"{self._serial}", prompt, parameters)
        self.llm.wake_up(tags=["scheduling"])
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                cached = min(cached, output.num_cached_tokens or 0)
            new = {numbers[output.request_id]: len(output.outputs[0].token_ids) for output in outputs}
            steps.append(timing.Step(now, {request: count for request, count in new.items() if count}))
        return steps, cached

    def counts(self) -> dict[str, int]:
        """The plugin's counters, which reading them waits for; nothing for stock vLLM."""
        if not self.job.ours:
            return {}
        return self.llm.collective_rpc("specattn_stats")[0] or {}


def kv_bytes(vllm_config: Any) -> int:
    """Bytes of K and V of a token in the caches of the target and of a draft model; without our sketches, which take
    a few per cent more."""
    target, speculation = vllm_config.model_config, vllm_config.speculative_config
    draft = None if speculation is None else speculation.draft_model_config
    # A target that drafts for itself, or by n-grams, has one cache.
    models = [target, *([draft] if draft is not None and draft.model != target.model else [])]
    parallel = vllm_config.parallel_config
    return sum(
        2 * model.get_num_layers(parallel) * model.get_num_kv_heads(parallel) * model.get_head_size()
        * model.dtype.itemsize
        for model in models
    )  # fmt: skip


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def fill_in(value: Any, folders: dict[str, str]) -> Any:
    """`value` with '{target}', '{draft}' and '{eagle}' replaced by the models' folders."""
    if isinstance(value, dict):
        return {key: fill_in(item, folders) for key, item in value.items()}
    return folders.get(value[1:-1], value) if isinstance(value, str) and value[:1] == "{" else value


def end_with_the_parent(seconds: float = 2.0) -> None:
    """Ends this process and its children once its parent is gone, however that ended: engines hold a GPU's memory."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(seconds)
        os.killpg(0, signal.SIGKILL)

    if os.getpgrp() == os.getpid():  # as `runner` starts it: the group is this worker's own
        threading.Thread(target=watch, daemon=True).start()


def main(arguments: list[str]) -> None:
    end_with_the_parent()
    job_path, result_path, events_path = map(Path, arguments)
    Worker(Job.model_validate_json(job_path.read_text()), result_path, events_path).run()


if __name__ == "__main__":
    main(sys.argv[1:])
