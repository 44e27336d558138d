"""Random schedules of requests that come, are aborted, preempted and found again: `schedules.py` draws and drives them,
`schedule_checks.py` looks at the engine after every step.

SPECATTN_SCHEDULES: how many schedules each setting gets. SPECATTN_SEED: the seed of the first. SPECATTN_SECONDS: after
these no other schedule begins.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from specattn_vllm.methods import METHODS

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

FIRST = 1
"""A seed whose schedule has some of everything."""
COUNT = int(os.environ.get("SPECATTN_SCHEDULES", "1"))
SEED = os.environ.get("SPECATTN_SEED")
SECONDS = float(os.environ.get("SPECATTN_SECONDS", "inf"))
SHRINK_SECONDS = float(os.environ.get("SPECATTN_SHRINK_SECONDS", "120"))

SHORT = {"min_tokens": 16, "recent_tokens": 8}
SKETCH = SHORT | {"method": "sketch", "ratio": 0.1}
ALONE = {"speculative_config": None}
NGRAMS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
# vLLM can choose the number of drafts anew in each step, by the number of requests. This order makes it change often.
BY_BATCH = {"drafts_by_batch_size": [(1, 1, 2), (2, 2, 3), (3, 3, 0), (4, 4, 1)]}
# vLLM's default: a step is planned before the tokens of the last are known.
AHEAD = {"async_scheduling": True}
# Drafters whose layers are vLLM's own: on a CPU their blocks have a multiple of 32 tokens.
WIDE = {"block_size": 32, "num_gpu_blocks_override": 11}
SETTINGS = {
    "sketch": (SKETCH | {"draft_ratio": 0.2}, {}),
    "sketch alone": (SKETCH, ALONE),
    "sketch with a guarantee": (SKETCH | {"epsilon": 0.2}, ALONE),
    "sketch with an fp8 cache": (SKETCH | {"draft_ratio": 0.2}, {"kv_cache_dtype": "fp8"}),
    "sketch with n-grams": (SKETCH | {"shared_budget": "heads"}, {"speculative_config": NGRAMS}),
    "sketch with EAGLE": (SKETCH, {"speculative_config": {"method": "eagle", "num_speculative_tokens": 3}}),
    "sketch with EAGLE-3": (SKETCH, {"speculative_config": {"method": "eagle3", "num_speculative_tokens": 2}}),
    "sketch with DFlash": (SKETCH, {"speculative_config": {"method": "dflash", "num_speculative_tokens": 3}} | WIDE),
    "sketch with DSpark": (SKETCH, {"speculative_config": {"method": "dspark", "num_speculative_tokens": 3}} | WIDE),
    "sketch with MTP": (SKETCH, {"speculative_config": {"method": "mtp", "num_speculative_tokens": 3}}),
    "sketch with modules of MTP": (SKETCH, {"speculative_config": {"method": "mtp", "num_speculative_tokens": 2}}),
    "specattn": (SHORT | {"method": "specattn", "ratio": 0.1}, {}),
    "sts": (SHORT | {"method": "sts", "ratio": 0.1}, {}),
    "vegas": (SHORT | {"method": "vegas", "ratio": 0.1, "crossover_tokens": 0}, {}),
    "streamingllm": (SHORT | {"method": "streamingllm", "ratio": 0.1, "crossover_tokens": 0}, {}),
    "dense": (SHORT | {"method": "dense", "sparse_draft": True, "ratio": 0.1}, {}),
    "sketch, planned ahead": (SKETCH | {"draft_ratio": 0.2}, AHEAD),
    "specattn, planned ahead": (SHORT | {"method": "specattn", "ratio": 0.1}, AHEAD),
    "dense, planned ahead": (SHORT | {"method": "dense", "sparse_draft": True, "ratio": 0.1}, AHEAD),
    "sketch, drafts by batch size": (SKETCH | {"draft_ratio": 0.2}, BY_BATCH),
    "specattn, drafts by batch size": (SHORT | {"method": "specattn", "ratio": 0.1}, BY_BATCH),
    "vegas, drafts by batch size": (SHORT | {"method": "vegas", "ratio": 0.1, "crossover_tokens": 0}, BY_BATCH),
}
"""Setting -> options with which a part is read of contexts of a hundred tokens, and arguments of the engine."""

TINY = {
    "sketch with EAGLE": ("target", "eagle"),
    "sketch with EAGLE-3": ("target", "eagle3"),
    "sketch with DFlash": ("target", "dflash"),
    "sketch with DSpark": ("target", "dspark"),
    "sketch with MTP": ("mimo", None),
    "sketch with modules of MTP": ("glm", None),
}
"""Setting -> the target of `tiny_models.py` that serves it, and its drafter, where that is a model of its own."""

LONG = (
    *(name for name in TINY if name != "sketch with EAGLE"),
    "sketch, drafts by batch size",
    "sketch with n-grams",
    "specattn, drafts by batch size",
    "vegas, drafts by batch size",
)
"""Settings whose code others run too."""

# Blocks for two requests, and few tokens a step: prompts come in chunks, and requests lose their blocks.
SHAPE = {"block_size": 16, "max_num_seqs": 4, "num_gpu_blocks_override": 20, "max_model_len": 256}
# Elsewhere not ahead: what the scheduler and the worker know of a request can then be held against each other.
SHAPE |= {"max_num_batched_tokens": 64, "num_speculative_tokens": 3, "async_scheduling": False}

LENGTHS = ((5, 64, 96, 128), (40, 96, 192))
"""Of prompts that begin in the same way. Most end with a block, so that what is added to one is a short chunk."""


def _beside(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cache_checks, schedules, schedule_checks = (_beside(n) for n in ("cache_checks", "schedules", "schedule_checks"))


@pytest.fixture
def planned_ahead(monkeypatch):
    """planned_ahead(): engines may plan ahead on a CPU too, for which vLLM forbids it; nothing is gained there."""
    from vllm.platforms import current_platform

    check = type(current_platform).check_and_update_config

    def allowed() -> None:
        @classmethod
        def check_and_update_config(cls, vllm_config):
            check(vllm_config)
            vllm_config.scheduler_config.async_scheduling = True

        monkeypatch.setattr(type(current_platform), "check_and_update_config", check_and_update_config)

    return allowed


def _texts(long: list[list[int]], plain) -> list:
    """Beginnings of long texts, and one that leaves the first of them within a block; with what plain decoding gives
    for each."""
    given = [text[:length] for text, lengths in zip(long, LENGTHS, strict=True) for length in lengths]
    given.append(long[0][:88] + long[1][:70])
    tokens = plain([{"prompt_token_ids": prompt} for prompt in given], schedules.NEEDED)
    return [schedules.Text(prompt, after) for prompt, after in zip(given, tokens, strict=True)]


@pytest.fixture(scope="module")
def known() -> dict[tuple, list]:
    """Texts, by the target and the cache that they are for."""
    return {}


@pytest.fixture
def texts(engine, greedy, plain, prompts, tiny_model, known):
    """texts(target, cache) -> the texts of the demo target (None) or of a tiny one, for a type of KV cache."""

    def plain_of_tiny(target: str, given: list[dict], number: int) -> list[list[int]]:
        llm = engine(None, target=tiny_model(target), skip_tokenizer_init=True, max_model_len=512)
        return greedy(llm, given, number)

    def dense_with_fp8(given: list[dict], number: int) -> list[list[int]]:
        return greedy(engine({"method": "dense"}, speculative_config=None, kv_cache_dtype="fp8"), given, number)

    def of(target: str | None, cache: str = "auto") -> list:
        if (target, cache) not in known:
            if target is None:
                long = [prompt["prompt_token_ids"] for prompt in prompts([192] * len(LENGTHS))]
                known[target, cache] = _texts(long, plain if cache == "auto" else dense_with_fp8)
            else:
                generator = torch.Generator().manual_seed(0)
                long = torch.randint(2, 512, (len(LENGTHS), 192), generator=generator).tolist()
                known[target, cache] = _texts(long, functools.partial(plain_of_tiny, target))
        return known[target, cache]

    return of


@pytest.mark.parametrize(
    "setting", [pytest.param(name, marks=pytest.mark.long if name in LONG else ()) for name in SETTINGS]
)
def test_random_schedules(
    setting, engine, texts, tiny_model, audit, sketch_audit, planned_ahead, monkeypatch, record_property
):
    options, arguments = SETTINGS[setting]
    arguments = SHAPE | arguments
    target, drafter = TINY.get(setting, (None, None))
    if target is not None:
        arguments |= {"target": tiny_model(target), "skip_tokenizer_init": True}
    if drafter is not None:
        arguments["speculative_config"] = arguments["speculative_config"] | {"model": tiny_model(drafter)}
    given = texts(target, arguments.get("kv_cache_dtype", "auto"))
    lossless = METHODS[options["method"]].lossless
    if arguments["async_scheduling"]:
        planned_ahead()
    watch = schedule_checks.Watch(monkeypatch, cache_checks)
    for look in ("check", "follow"):
        monkeypatch.setattr(sketch_audit, look, watch.unless_nobody(getattr(sketch_audit, look)))

    def fresh() -> schedules.Driver:
        watch.runner = None
        for state in (audit.owner, audit.made_for, audit.violations, sketch_audit.chosen):
            state.clear()
        llm = engine(options, **arguments)
        watch.attend(llm, audit, lossless)
        return schedules.Driver(llm, given, watch, lossless)

    driver = fresh()
    happened, first, end = Counter(), int(SEED or FIRST), time.monotonic() + SECONDS
    for seed in range(first, first + COUNT):
        if time.monotonic() > end:
            break
        happened["schedules"] += 1
        problem = driver.run(schedules.draw(seed, len(given)))
        if problem:
            pytest.fail(_report(setting, first, seed, problem, fresh, len(given)), pytrace=False)
    happened += driver.happened + watch.seen + Counter({"steps": driver.steps})
    record_property("happened", dict(happened))
    record_property("seeds", [first, first + happened["schedules"] - 1])
    print(f"\n{setting}: {dict(happened)}")
    if SEED is None:
        wanted = {"preempted", "finished", "found a prefix", "keys"}
        wanted |= {"tokens that are plain decoding's", "batches in another order", "steps of made-up requests"}
        if "drafts_by_batch_size" in arguments:
            wanted |= {f"verifications of {number} drafts" for number in (1, 2, 3)}
        if arguments["async_scheduling"]:
            wanted |= {"tokens that the scheduler does not know yet"}
        if not lossless:
            wanted |= {"rows that read a part"}
        if "epsilon" in options:
            wanted |= {"heads that fell"}
        if watch.store is not None:
            wanted |= {"spoilt", "short chunks in slots with a selection"}
        missing = {what for what in wanted if not happened[what]}
        assert not missing, f"no longer in the first schedules: {missing}"


def _report(setting: str, first: int, seed: int, problem: str, fresh, texts: int) -> str:
    """What failed, how to repeat it, and the shortest schedule that still fails."""

    def command(seed: int, count: int) -> str:
        environment = f"SPECATTN_LONG=1 SPECATTN_SEED={seed} SPECATTN_SCHEDULES={count}"
        return f"{environment} scripts/test -n 0 'tests/engine/test_schedules.py::test_random_schedules[{setting}]'"

    schedule = schedules.draw(seed, texts)
    alone = fresh().run(schedule)
    lines = [f"{setting}, seed {seed}: {problem}"]
    if not alone:
        return "\n".join([*lines, f"only after others: {command(first, seed - first + 1)}"])
    # Only the same failure counts: the place, not the numbers in its message.
    same = alone.split(":")[0]
    short = schedules.shrink(schedule, lambda ops: (fresh().run(ops) or "").startswith(same), SHRINK_SECONDS)
    lines += [f"repeat it: {command(seed, 1)}", f"{len(schedule)} operations, of which these are enough:"]
    return "\n".join([*lines, *(f"  {operation}" for operation in short), f"then: {fresh().run(short)}"])
