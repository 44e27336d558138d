"""Random schedules: what a seed stands for, how it is driven through an engine, and how a failing one is made short."""

from __future__ import annotations

import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

MOST_NEW = 40
"""New tokens of a request, at most."""
MOST_FURTHER = 24
"""How far a prompt may go into what plain decoding gave for it."""
NEEDED = MOST_NEW + MOST_FURTHER
"""Tokens of plain decoding that each text needs."""


class Text(NamedTuple):
    """A prompt, and the tokens that plain decoding puts after it. With some of these it is a prompt too: so there are
    prompts of any length that have their first blocks in common."""

    prompt: list[int]
    plain: list[int]


class Add(NamedTuple):
    """A new request: the prompt of `text` with `further` tokens of plain decoding."""

    name: str
    text: int
    further: int
    most: int
    exact: bool = False
    temperature: float = 0.0
    seed: int | None = None


class Abort(NamedTuple):
    """A request leaves, wherever it is; nothing happens if it is unknown or has ended."""

    name: str


class Step(NamedTuple):
    times: int


class Drain(NamedTuple):
    """Steps until all requests have ended."""


class Reset(NamedTuple):
    """Forget what the prefix cache holds. It is refused while somebody runs."""


class Dummy(NamedTuple):
    """A step of vLLM's on made-up requests, which name the slots of real ones."""


class Recall(NamedTuple):
    """All requests lose their slots and their blocks at once, and come back."""


class Spoil(NamedTuple):
    """All selections that are kept for a later step become ones for another length."""


class Shuffle(NamedTuple):
    """Whoever runs stands in another order from now on: in the batch, and in who loses their blocks first."""

    seed: int


def draw(seed: int, texts: int) -> list:
    """The schedule of a seed."""
    rng = random.Random(seed)
    schedule: list = []
    names: list[str] = []
    few = rng.sample(range(texts), min(4, texts))  # so that prefixes are found again
    for number in range(rng.randint(7, 10)):
        name = f"r{number}"
        names.append(name)
        sampled = rng.random() < 0.2
        schedule.append(
            Add(
                name,
                rng.choice(few) if rng.random() < 0.7 else rng.randrange(texts),
                rng.choice((0, 1, rng.randint(1, 4), rng.randint(0, MOST_FURTHER))),
                rng.choice((1, 2, rng.randint(3, 20), rng.randint(20, MOST_NEW), MOST_NEW, MOST_NEW)),
                exact=rng.random() < 0.5,
                temperature=rng.choice((0.5, 1.0)) if sampled else 0.0,
                seed=rng.randrange(1000) if sampled else None,
            )
        )
        schedule.append(Step(rng.choice((0, 0, 0, 0, 1, 1, 2, 4))))
        chance = rng.random()
        if chance < 0.3:
            schedule += [Abort(rng.choice(names[-4:])), Step(rng.choice((0, 1, 2)))]
        elif chance < 0.4:
            schedule.append(Dummy())
        elif chance < 0.48:
            schedule.append(Recall())
        elif chance < 0.58:
            schedule.append(Reset())
        elif chance < 0.61:
            schedule += [Drain(), Reset()]
        elif chance < 0.75:
            schedule += [Step(2), Spoil(), Step(1)]
        else:
            schedule += [Step(1), Shuffle(seed * 100 + number), Step(2)]
    return schedule


class Driver:
    """Drives schedules through one engine, and looks at its state after every step."""

    def __init__(self, llm: Any, texts: Sequence[Text], watch: Any, lossless: bool) -> None:
        """watch: a `Watch` of `schedule_checks.py`. lossless: whether every request gets plain decoding's tokens."""
        self.llm, self.engine, self.texts, self.watch, self.lossless = llm, llm.llm_engine, texts, watch, lossless
        self.limit = llm.llm_engine.vllm_config.model_config.max_model_len
        self.steps = 0
        self.happened: Counter[str] = Counter()
        self.live: dict[str, Add] = {}
        self.out: dict[str, list[int]] = {}
        self.order: list[str] = []
        """Requests of the last batch, by row."""

    def run(self, schedule: Sequence) -> str | None:
        """What went wrong, or None. After that the engine may be in any state."""
        try:
            for operation in [*schedule, Drain()]:
                getattr(self, type(operation).__name__.lower())(operation)
            # Tell the worker who has ended; and take what was planned ahead.
            self.engine.step()
            while self.engine.engine_core.engine_core.batch_queue:
                self.engine.step()
            self.watch.at_rest()
            self.reset(Reset())
            self.watch.at_rest()
        except Exception as problem:
            at = [f for f in traceback.extract_tb(problem.__traceback__) if "/site-packages/" not in f.filename]
            return f"{type(problem).__name__} at {at[-1].name}, line {at[-1].lineno}: {str(problem)[:400]}"
        return None

    def add(self, request: Add) -> None:
        from vllm import SamplingParams

        prompt, _ = self._prompt(request)
        parameters = SamplingParams(
            temperature=request.temperature,
            seed=request.seed,
            max_tokens=request.most,
            ignore_eos=True,
            detokenize=False,
            extra_args={"specattn": "exact"} if request.exact else None,
        )
        self.engine.add_request(request.name, {"prompt_token_ids": prompt}, parameters)
        self.live[request.name], self.out[request.name] = request, []
        self.watch.exact[request.name] = request.exact

    def abort(self, operation: Abort) -> None:
        if self.live.pop(operation.name, None) is not None:
            self.happened[f"aborted while {self.watch.stage(operation.name)}"] += 1
            self.engine.abort_request([operation.name])

    def step(self, operation: Step) -> None:
        for _ in range(operation.times):
            if self.live:
                self._step()

    def drain(self, operation: Drain) -> None:
        for _ in range(60 * (1 + len(self.live))):
            if not self.live:
                return
            self._step()
        raise AssertionError(f"still unfinished: {[*self.live]}")

    def reset(self, operation: Reset) -> None:
        idle = not self.watch.holders()
        assert self.engine.reset_prefix_cache() == idle, f"the prefix cache was forgotten or not, idle: {idle}"

    def dummy(self, operation: Dummy) -> None:
        by_slot, runner = self.watch.cache_checks.by_slot, self.watch.runner
        before = by_slot(runner)
        with self.watch.nobody():
            self.llm.collective_rpc(lambda worker: worker.model_runner._dummy_run(8, skip_attn=False) and None)
        for kept, now in zip(before, by_slot(runner), strict=True):
            assert kept.equal(now), f"made-up requests changed what is kept for real ones: {kept} to {now}"
        self.happened["steps of made-up requests"] += bool(self.live)

    def recall(self, operation: Recall) -> None:
        self.engine.reset_prefix_cache(reset_running_requests=True)

    def spoil(self, operation: Spoil) -> None:
        self.watch.spoil()

    def shuffle(self, operation: Shuffle) -> None:
        # vLLM sorts a batch by the tokens of each request. Among equals, the scheduler's order stays.
        random.Random(operation.seed).shuffle(self.watch.scheduler.running)

    def _step(self) -> None:
        self.steps += 1
        self.watch.batch = None
        for output in self.engine.step():
            self._take(output)
        self.watch.after_step()
        if self.watch.batch is not None:
            self._note(self.watch.batch)

    def _note(self, batch: Any) -> None:
        """What a schedule has to meet, by what the batch of a step was."""
        before, now = self.order, list(batch.req_ids)
        kept = [name for name in before if name in now]
        self.happened["batches in another order"] += kept != [name for name in now if name in before]
        self.order = now
        drafts = batch.num_draft_tokens_per_req
        if drafts is not None:
            for number in drafts[: batch.num_reqs][~batch.is_prefilling_np[: batch.num_reqs]]:
                self.happened[f"verifications of {number} drafts"] += 1

    def _prompt(self, request: Add) -> tuple[list[int], list[int]]:
        """The tokens of a request, and those that plain decoding gives it."""
        text = self.texts[request.text]
        prompt = text.prompt + text.plain[: request.further]
        return prompt, text.plain[request.further :][: min(request.most, self.limit - len(prompt))]

    def _take(self, output: Any) -> None:
        name, [answer] = output.request_id, output.outputs
        if name not in self.live:
            return
        request, tokens, before = self.live[name], list(answer.token_ids), self.out[name]
        expected = self._prompt(request)[1]
        assert tokens[: len(before)] == before, f"{name}: tokens changed that were given before"
        assert len(tokens) - len(before) <= self.watch.most_a_step, f"{name}: {len(tokens) - len(before)} in a step"
        assert all(0 <= token < self.watch.vocabulary for token in tokens), f"{name}: {tokens}"
        if request.temperature == 0 and (self.lossless or request.exact):
            assert tokens == expected[: len(tokens)], f"{name}: {tokens} instead of {expected}"
            self.happened["tokens that are plain decoding's"] += len(tokens) - len(before)
        self.out[name] = tokens
        if output.num_cached_tokens and not before:
            self.happened["found a prefix"] += 1
        if output.finished:
            assert len(tokens) == len(expected), f"{name}: {len(tokens)} tokens of {len(expected)}"
            del self.live[name]
            self.happened["finished"] += 1


def shrink(schedule: Sequence, fails: Callable[[Sequence], bool], seconds: float) -> list:
    """The schedule without operations that a failure does not need: first halves are dropped, at last single ones."""
    schedule, end = list(schedule), time.monotonic() + seconds
    size = len(schedule) // 2
    while size:
        start = 0
        while start < len(schedule) and time.monotonic() < end:
            shorter = schedule[:start] + schedule[start + size :]
            if fails(shorter):
                schedule = shorter
            else:
                start += size
        size //= 2
    return schedule
