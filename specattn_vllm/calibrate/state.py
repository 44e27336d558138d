"""What has been measured, beside the map to be: so that a run that was cut off goes on, and gives the same map."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from specattn_vllm.calibrate.arguments import state_file
from specattn_vllm.installed import UserError
from specattn_vllm.tools.outputs import write_whole

__all__ = ["State", "state_file"]

SCHEMA = "specattn-calibration-state/3"


class State:
    """Sums over windows by name, with the number of windows in each."""

    def __init__(self, path: Path, key: str) -> None:
        """key: what the measurements depend on; a file that has another is refused."""
        self.path = path
        self.key = key
        self.done: dict[str, int] = {}
        self.sums: dict[str, dict[str, torch.Tensor]] = {}

    def load(self) -> None:
        """Go on from the file, if there is one."""
        try:
            found = json.loads(self.path.read_text())
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path} cannot be gone on from ({error}): delete it, or give --overwrite") from None
        if not isinstance(found, dict) or (found.get("schema"), found.get("key")) != (SCHEMA, self.key):
            raise UserError(
                f"{self.path} is of a calibration with other models, text or settings: give another --out, or "
                "--overwrite to start anew"
            )
        self.done = found["done"]
        self.sums = {
            phase: {name: torch.tensor(values, dtype=torch.float64) for name, values in sums.items()}
            for phase, sums in found["sums"].items()
        }

    def add(self, phase: str, found: dict[str, torch.Tensor]) -> None:
        """Take in one window's sums, and save."""
        before = self.sums.get(phase)
        ours = {name: value.double().cpu() for name, value in found.items()}
        self.sums[phase] = ours if before is None else {name: before[name] + value for name, value in ours.items()}
        self.done[phase] = self.done.get(phase, 0) + 1
        # As JSON writes a float it reads back as the same one, so going on changes no bit.
        sums = {p: {name: value.tolist() for name, value in of.items()} for p, of in self.sums.items()}
        content = {"schema": SCHEMA, "key": self.key, "done": self.done, "sums": sums}
        write_whole(self.path, json.dumps(content))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
