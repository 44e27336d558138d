"""Saves measurements in a file beside the map, so that an interrupted run can go on and gives the same map."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from specattn_vllm import data_file
from specattn_vllm.installed import UserError
from specattn_vllm.tools.outputs import write_whole

SCHEMA = "specattn-calibration-state/4"


class State:
    """Sums by name over all windows that were measured so far."""

    def __init__(self, path: Path, key: str) -> None:
        """Continue from the file, if there is one. `key`: everything that the measurements depend on. Raises UserError
        if the file has another key or cannot be read."""
        self.path, self.key = path, key
        self.windows = 0
        self.sums: dict[str, torch.Tensor] = {}
        try:
            found = data_file.parse(path.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be resumed ({error}): delete it, or give --overwrite") from None
        if not isinstance(found, dict) or (found.get("schema"), found.get("key")) != (SCHEMA, key):
            raise UserError(
                f"{path} belongs to a calibration with other models, text or settings: give another --out, or "
                "--overwrite to start again"
            )
        self.windows = found["windows"]
        self.sums = {name: torch.tensor(values, dtype=torch.float64) for name, values in found["sums"].items()}

    def add(self, found: dict[str, torch.Tensor]) -> None:
        """Add one window's values, and save."""
        self.sums = {name: self.sums[name] + value if self.windows else value for name, value in found.items()}
        self.windows += 1
        # JSON reads a float back exactly as it was written, so a resumed run gives the same bits.
        sums = {name: value.tolist() for name, value in self.sums.items()}
        write_whole(self.path, json.dumps({"schema": SCHEMA, "key": self.key, "windows": self.windows, "sums": sums}))
