"""What has been measured, beside the map to be: so that a run that was cut off goes on, and gives the same map."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from specattn_vllm.installed import UserError
from specattn_vllm.tools.outputs import write_whole

SCHEMA = "specattn-calibration-state/4"


class State:
    """Sums by name over the windows that were measured so far."""

    def __init__(self, path: Path, key: str) -> None:
        """Goes on from the file, if there is one; UserError if it is of another `key`, what the measurements depend on,
        or cannot be read."""
        self.path, self.key = path, key
        self.windows = 0
        self.sums: dict[str, torch.Tensor] = {}
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be gone on from ({error}): delete it, or give --overwrite") from None
        if not isinstance(found, dict) or (found.get("schema"), found.get("key")) != (SCHEMA, key):
            raise UserError(
                f"{path} is of a calibration with other models, text or settings: give another --out, or --overwrite "
                "to start anew"
            )
        self.windows = found["windows"]
        self.sums = {name: torch.tensor(values, dtype=torch.float64) for name, values in found["sums"].items()}

    def add(self, found: dict[str, torch.Tensor]) -> None:
        """Take in one window's values, and save."""
        self.sums = {name: self.sums[name] + value if self.windows else value for name, value in found.items()}
        self.windows += 1
        # As JSON writes a float it reads back as the same one, so going on changes no bit.
        sums = {name: value.tolist() for name, value in self.sums.items()}
        write_whole(self.path, json.dumps({"schema": SCHEMA, "key": self.key, "windows": self.windows, "sums": sums}))
