"""The checks, each with what it found and what to do about it. Loads neither torch nor vLLM."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from specattn_vllm import info
from specattn_vllm.cpu_runner import OVERLAY
from specattn_vllm.doctor.probes import ask
from specattn_vllm.installed import DEMO_ROLES, GET_DEMO, UserError, demo_folder


@dataclass(frozen=True)
class Finding:
    check: str
    status: Literal["ok", "warning", "problem", "skipped"]
    says: str
    remedy: str | None = None
    """What to do; always there for a problem, and for what is skipped where there is something to do."""


def examine(serve: Sequence[str], *, generate: bool) -> Iterator[Finding]:
    """All findings, in the order in which they are made. serve: arguments of `vllm serve`, the model first; may be
    empty. What depends on a check that failed is skipped."""
    told = info.gather()
    for problem in told["problems"]:
        says, _, remedy = problem.partition(": ")
        yield Finding("installation", "problem", says, remedy)
    if told["problems"]:
        yield Finding("everything else", "skipped", "the installation has to be mended first")
        return
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items() if version)
    yield Finding("installation", "ok", f"specattn-vllm {told['specattn-vllm']}, python {told['python']}, {versions}")
    yield _machine(told)
    found = ask("plugin")
    yield _judged("plugin in a vLLM process", found, "mend what is named, or reinstall vLLM")
    if "error" in found:
        return
    if serve:
        yield from _engine(serve)
    else:
        yield Finding("model", "skipped", "no model was named: specattn doctor MODEL [arguments of vllm serve]")
    if generate:
        yield _generation()
    else:
        yield Finding("generation", "skipped", "as asked (--no-generation)")


def _judged(check: str, answer: dict[str, Any], remedy: str) -> Finding:
    """Of a probe's answer: what it says, or its error."""
    if "error" in answer:
        return Finding(check, "problem", answer["error"], answer.get("remedy", remedy))
    return Finding(check, "ok", answer["says"])


def _machine(told: dict[str, Any]) -> Finding:
    if gpus := told["gpus"]:
        named = "; ".join(f"{gpu['name']}, {gpu['memory']}" for gpu in gpus)
        says = f"{named}; executor: {told['executor']}"
        if told["executor"].startswith("not known"):
            remedy = "see whether torch sees the GPU: python -c 'import torch; torch.zeros(1).cuda()'"
            return Finding("GPU", "problem", says, remedy)
        return Finding("GPU", "ok", says)
    if str(OVERLAY) not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        return Finding(
            "GPU",
            "problem",
            "none is seen, and on a CPU vLLM's runner V2 has to be switched on",
            'eval "$(specattn cpu-env)" in this shell; on a machine with a GPU, see why nvidia-smi lists none',
        )
    says = "none is seen: on a CPU the plugin is for trying and testing"
    return Finding("GPU", "warning", says, "serve on a machine with an NVIDIA GPU")


def _engine(serve: Sequence[str]) -> Iterator[Finding]:
    """What the engine's configuration is refused for, and what it would take."""
    model = serve[0]
    if model.startswith(("/", ".", "~")) and not Path(model).expanduser().is_dir():
        remedy = "give a folder that holds a model, or a name on the hub"
        yield Finding("model and options", "problem", f"there is no folder {model}", remedy)
        return
    found = ask("config", *serve)
    yield _judged("model and options", found, "change what is named")
    if "unknown" in found:
        yield Finding("memory", "skipped", found["unknown"])
    elif "error" not in found:
        yield _memory(found)


def _memory(found: dict[str, Any]) -> Finding:
    buffers, weights, longest = sum(found["buffers"].values()), found["weights"], found["max_model_len"]
    cache = found["kv_per_token"] * longest + found["kv_in_windows"] + found["kv_in_states"]
    others = f" and {_bytes(found['kv_in_windows'])} in layers with a sliding window" * bool(found["kv_in_windows"])
    if found["stateful_layers"]:
        states = f"the states of {found['stateful_layers']} layers of linear attention or Mamba"
        others += f" and {_bytes(found['kv_in_states'])} for {states}"
    parts = ", ".join(f"{what} {_bytes(size)}" for what, size in found["buffers"].items())
    of_weights = _bytes(weights) if weights else "an unknown size (not in a local folder)"
    says = (
        f"{_bytes(buffers)} of buffers for {found['max_num_seqs']} requests of {longest:,} tokens ({parts}), "
        f"{of_weights} of weights, {_bytes(cache)} of KV cache for one longest request "
        f"({_bytes(found['kv_per_token'])} for each token, {found['sketch_share']:.1%} of it the sketch{others}); "
        f"vLLM would use {_bytes(found['room'])}"
    )
    # An engine refuses buffers of one model of more than half of what the weights leave, too.
    if buffers + weights + cache <= found["room"] and found["largest"] <= (found["room"] - weights) // 2:
        return Finding("memory", "ok", says)
    lower = "lower --max-model-len or --max-num-seqs, or use more GPUs (--tensor-parallel-size) or larger ones"
    return Finding("memory", "problem", says, lower)


def _bytes(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _generation() -> Finding:
    """A few tokens of the demo pair, in an engine whose worker says what it read."""
    try:
        folders = [str(demo_folder(role)) for role in DEMO_ROLES]
    except UserError:
        return Finding("generation", "skipped", "not tried: the demo pair is not in this installation", GET_DEMO)
    return _judged("generation", ask("generate", *folders), "mend what is named; the line above is vLLM's own")
