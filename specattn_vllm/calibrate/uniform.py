"""Writes the uniform layer maps of well-known pairs, which ship with the package.

Nothing was measured for them. An engine makes the same map itself for a pair without a map. The file can be copied and
changed; it shows the paired layers, the models, and the command that makes a calibrated map.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from specattn_vllm import layer_map
from specattn_vllm.calibrate.maps import as_json
from specattn_vllm.fingerprint import facts_from_config
from specattn_vllm.tools.models import ROLES, load_shape


class Pair(NamedTuple):
    """Pairs of models on the hub, the instruct ones first, and the name of their shape in the benchmark."""

    shape: str
    models: tuple[tuple[str, str], ...]
    """(target, draft) pairs that the file names. The map also serves other models of the same architecture."""


PAIRS = {
    "llama-3.1-8b-llama-3.2-1b": Pair(
        "llama-8b-1b",
        (
            ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"),
            ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B"),
        ),
    ),
    "qwen3-8b-qwen3-0.6b": Pair("qwen3-8b-0.6b", (("Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B"),)),
}
"""Name of the shipped map -> its pair."""


def map_text(pair: Pair) -> str:
    """The text of the file. Its models have no digest of weights, so the map fits all weights of these shapes."""
    configs = load_shape(pair.shape).configs
    found = layer_map.uniform(*(facts_from_config(configs[role]) for role in ROLES))
    target, draft = pair.models[0]
    provenance = {
        "made": "uniform, not calibrated: layers paired by relative depth, the target's first reads everything",
        "command": "python -m specattn_vllm.calibrate.uniform configs",
        "models": [f"{target} with {draft}" for target, draft in pair.models],
        "calibrate": f"specattn calibrate --target {target} --draft {draft} --text FILES --out map.json",
    }
    return as_json(found.model_dump(mode="json", by_alias=True) | {"provenance": provenance})


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the uniform layer maps that ship with the package.")
    parser.add_argument("folder", type=Path, help="where to, e.g. configs")
    folder = parser.parse_args().folder
    for name, pair in PAIRS.items():
        (folder / f"{name}.json").write_text(map_text(pair))


if __name__ == "__main__":
    main()
