"""What is installed: versions, and the demo pair. Loads neither torch nor vLLM."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from specattn_vllm import cpu_runner

DEMO = Path(__file__).parent / "demo"
DEMO_ROLES = ("target", "draft")


class UserError(Exception):
    """Something the user can put right: printed without a traceback, exit code 2 (argparse's own)."""


def version_of(name: str) -> str | None:
    """The version of an installed distribution, looking past the one that stands in for `vllm` in the CPU overlay."""
    for found in metadata.distributions(name=name):
        if Path(str(found.locate_file(""))).resolve() != cpu_runner.OVERLAY.resolve():
            return found.version
    return None


def demo_folder(role: str) -> Path:
    folder = DEMO / role
    if not (folder / "config.json").is_file():
        raise UserError(
            f"the demo {role} model is not in this installation (looked for {folder / 'config.json'}): install "
            "specattn-vllm again from its wheel or a complete clone, or give `vllm serve` a model of your own"
        )
    return folder
