"""Finds what is installed: versions, modules that a command needs, the demo pair. Loads neither torch nor vLLM."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from specattn_vllm import cpu_runner

DEMO = Path(__file__).parent / "demo"
DEMO_ROLES = ("target", "draft")


class UserError(Exception):
    """An error that the user can correct. It is printed without a traceback; exit code 2, as in argparse."""


EXTRAS = {**dict.fromkeys(("rich", "jinja2", "matplotlib", "numpy", "pandas"), "bench"), "shtab": "completion"}
"""Modules of our extras. All other modules that commands need come with vLLM."""
GET_VLLM = (
    "pip install 'specattn-vllm[gpu]'; without a GPU, `scripts/serve` in a clone installs a vLLM for CPUs (docs/cpu.md)"
)
GET_DEMO = (
    "the wheel leaves the demo pair out; `pip install -e .` in a clone or in the unpacked source distribution brings it"
)


def require(modules: Sequence[str]) -> None:
    """Raise UserError if one of these modules is missing. The message says what to install."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    ours = [name for name in missing if name in EXTRAS]
    theirs = [name for name in missing if name not in EXTRAS]
    remedies = []
    if "vllm" in theirs:
        remedies.append(f"vLLM is not installed: {GET_VLLM}")
    elif theirs:
        remedies.append(f"{_listed(theirs)} not installed, which vLLM brings: {GET_VLLM}")
    if ours:
        extras = ",".join(sorted({EXTRAS[name] for name in ours}))
        remedies.append(f"{_listed(ours)} not installed: pip install 'specattn-vllm[{extras}]'")
    if remedies:
        raise UserError("; ".join(remedies))


def _listed(names: list[str]) -> str:
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'}"


def version_of(name: str) -> str | None:
    """The version of an installed distribution; None if there is none. Ignores the substitute for `vllm` in the CPU
    overlay."""
    for found in metadata.distributions(name=name):
        if Path(str(found.locate_file(""))).resolve() != cpu_runner.OVERLAY.resolve():
            return found.version
    return None


def demo_folder(role: str) -> Path:
    folder = DEMO / role
    if not (folder / "config.json").is_file():
        raise UserError(
            f"the demo {role} model is not in this installation (looked for {folder / 'config.json'}): {GET_DEMO}, or "
            "name a model of your own"
        )
    return folder
