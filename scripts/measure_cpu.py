#!/usr/bin/env python3
"""Speed of the demo pair on a CPU, and where the time goes.

    eval "$(specattn cpu-env)"
    python3 scripts/measure_cpu.py --out docs/results/cpu.json

One request at a time, greedy, on held-out code (modules of the standard library). Each engine runs in a process of its
own, and they take turns, because a machine's speed drifts; what is reported of each mode is its median run, with the
slowest and the fastest. Leave the machine alone meanwhile.
"""

import argparse
import functools
import json
import os
import shlex
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

MODES = {
    "stock": None,  # vLLM as it comes, no speculation: on a CPU it picks runner V1
    "plain": None,  # the same on runner V2, which is what the plugin needs
    "dense": {"method": "dense"},
    "specattn": {"method": "specattn"},
}
MODULES = (
    "argparse.py",
    "ast.py",
    "asyncio/base_events.py",
    "calendar.py",
    "configparser.py",
    "dataclasses.py",
    "inspect.py",
    "pathlib.py",
    "typing.py",
)


class Clock:
    """Seconds spent in wrapped functions, by label; a wrapped function inside another counts for the inner label."""

    def __init__(self):
        self.seconds = {}
        self._inner = [0.0]

    def wrap(self, owner, name: str, label: str) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args, **kwargs):
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - start
                self.seconds[label] = self.seconds.get(label, 0.0) + took - self._inner.pop()
                self._inner[-1] += took

        setattr(owner, name, timed)


def watch(clock: Clock) -> None:
    from triton.runtime.interpreter import GridExecutor
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    from specattn_vllm.backend.impl import SpecAttnImpl
    from specattn_vllm.selection.capture import DraftCapture
    from specattn_vllm.selection.pruner import Pruner

    clock.wrap(GridExecutor, "__call__", "vLLM's Triton kernels, interpreted")
    clock.wrap(UnquantizedLinearMethod, "apply", "linear layers")
    clock.wrap(SpecAttnImpl, "forward", "attention")
    clock.wrap(SpecAttnImpl, "do_kv_cache_update", "attention")
    clock.wrap(DraftCapture, "attend", "draft attention with capture")
    clock.wrap(DraftCapture, "select", "selection")
    clock.wrap(Pruner, "prune", "pruning")


def measure(mode: str, context: int, requests: int, tokens: int, draft_tokens: int) -> dict:
    """One engine, in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    from specattn_vllm import installed

    target, draft = (str(installed.demo_folder(role)) for role in installed.DEMO_ROLES)
    stdlib = Path(sysconfig.get_path("stdlib"))
    text = "\n\n".join((stdlib / name).read_text() for name in MODULES)
    ids = AutoTokenizer.from_pretrained(target)(text, add_special_tokens=False).input_ids
    stride = (len(ids) - context) // requests
    prompts = [{"prompt_token_ids": ids[i * stride : i * stride + context]} for i in range(requests)]
    arguments = {}
    if MODES[mode] is not None:
        arguments = {
            "attention_backend": "specattn",
            "additional_config": {"specattn": MODES[mode]},
            "speculative_config": {"model": draft, "num_speculative_tokens": draft_tokens},
        }
    llm = LLM(
        target,
        dtype="float32",
        enforce_eager=True,
        max_model_len=8192,
        max_num_seqs=8,
        max_num_batched_tokens=2048,
        distributed_executor_backend="uni",
        **arguments,
    )

    def generate(prompt, n):
        parameters = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
        llm.generate([prompt], parameters, use_tqdm=False)

    start = time.perf_counter()
    for prompt in prompts:  # prefills, so that what follows finds the prompt in the prefix cache; warms up too
        generate(prompt, 2)
    prefill = time.perf_counter() - start
    clock = Clock()
    if MODES[mode] is not None:
        watch(clock)
    before = counters(llm)
    start = time.perf_counter()
    for prompt in prompts:
        generate(prompt, tokens)
    seconds = time.perf_counter() - start
    after = counters(llm)
    runner = "V2" if llm.llm_engine.vllm_config.use_v2_model_runner else "V1"
    result = {
        "mode": mode,
        "runner": runner,
        "tokens_per_second": round(requests * tokens / seconds, 2),
        "prefill_tokens_per_second": round(requests * context / prefill),
    }
    if after is not None:
        counts = {name: after[name] - before[name] for name in after}
        result["acceptance_length"] = round(counts["sampled_tokens"] / counts["rounds"], 3)
        result["kv_read"] = round(counts["kv_read"] / counts["kv_full"], 4) if counts["kv_full"] else 1.0
        result["milliseconds_per_round"] = round(1000 * seconds / counts["rounds"], 1)
        shares = {label: round(spent / seconds, 3) for label, spent in clock.seconds.items()}
        shares["the rest (vLLM's Python, other operations)"] = round(1 - sum(shares.values()), 3)
        result["share_of_time"] = dict(sorted(shares.items(), key=lambda item: -item[1]))
    return result


def counters(llm) -> dict | None:
    """The plugin's counters; None for vLLM without it."""
    return llm.collective_rpc("specattn_stats")[0] if os.environ.get("VLLM_PLUGINS") != "" else None


def environment(mode: str) -> dict[str, str]:
    """Of stock vLLM without what `specattn cpu-env` sets, and without the plugin."""
    if mode != "stock":
        return dict(os.environ)
    from specattn_vllm import cpu_runner

    return cpu_runner.without(os.environ) | {"VLLM_PLUGINS": ""}


def run_apart(mode: str) -> dict:
    command = [sys.executable, __file__, *sys.argv[1:], "--mode", mode]
    run = subprocess.run(command, capture_output=True, text=True, env=environment(mode))
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if run.returncode or not lines:
        raise SystemExit(f"measure_cpu.py: error: {mode} failed:\n{run.stderr[-3000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=4000)
    parser.add_argument("--requests", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each mode")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="only these")
    parser.add_argument("--out", type=Path, help="JSON file; printed without it")
    parser.add_argument("--mode", choices=MODES, help="measure one mode in this process and print it (internal)")
    args = parser.parse_args()
    settings = (args.context, args.requests, args.tokens, args.draft_tokens)
    if args.mode:
        print("RESULT " + json.dumps(measure(args.mode, *settings)))
        return
    runs = {mode: [] for mode in args.modes}
    for _ in range(args.repeats):
        for mode in args.modes:
            runs[mode].append(run_apart(mode))
            print(json.dumps(runs[mode][-1]), flush=True)
    results = []
    for found in runs.values():
        found.sort(key=lambda result: result["tokens_per_second"])
        spread = [found[0]["tokens_per_second"], found[-1]["tokens_per_second"]]
        results.append({**found[len(found) // 2], "tokens_per_second_range": spread})
    from specattn_vllm.tools.provenance import provenance

    report = {
        **provenance(),
        "command": shlex.join(["python3", "scripts/measure_cpu.py", *sys.argv[1:]]),
        "settings": {
            "context": args.context,
            "requests": args.requests,
            "tokens": args.tokens,
            "batch": 1,
            "draft_tokens": args.draft_tokens,
            "repeats": args.repeats,
            "dtype": "float32",
            "temperature": 0,
        },
        "results": results,
    }
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    else:
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
