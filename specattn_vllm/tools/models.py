"""Pairs of models: named ones, and the shapes of well-known ones, with the folders that an engine loads them from.
Standard library only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from specattn_vllm.installed import UserError, demo_folder

DEMO = "demo"
"""The pair that ships with the package, with its real weights; the other shapes have random ones."""
ROLES = ("target", "draft")
EAGLE = "eagle"
"""A third role, of shapes that have a head of EAGLE-3's."""


def model_folder(role: str, name: str) -> str:
    """Where a model is: the demo pair's folder, a folder, or a name on the hub, which is looked up later."""
    if name == DEMO:
        return str(demo_folder(role))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"--{role} {name}: no config.json in this folder, so it holds no model")
        return str(folder)
    # Names on the hub are OWNER/MODEL or MODEL.
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f"--{role} {name}: there is no such folder; give one that holds a model, or a name on the hub")
    return name


@dataclass(frozen=True)
class Shape:
    name: str
    description: str
    configs: dict[str, dict]
    """Role -> config.json. A hybrid has a target alone: no draft model is served beside it."""

    @property
    def has_weights(self) -> bool:
        return self.name == DEMO

    @property
    def max_position(self) -> int:
        return min(config["max_position_embeddings"] for config in self.configs.values())

    @property
    def vocab_size(self) -> int:
        return min(config["vocab_size"] for config in self.configs.values())


def shape_names(with_draft: bool = False) -> list[str]:
    """All, or those that have a draft model."""
    files = (resources.files("specattn_vllm.tools") / "shapes").iterdir()
    names = [DEMO, *sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))]
    return [name for name in names if not with_draft or name == DEMO or "draft" in load_shape(name).configs]


def load_shape(name: str) -> Shape:
    if name == DEMO:
        configs = {role: json.loads((demo_folder(role) / "config.json").read_text()) for role in ROLES}
        return Shape(name, "The demo pair, with its own weights", configs)
    file = resources.files("specattn_vllm.tools") / "shapes" / f"{name}.json"
    if not file.is_file():
        raise ValueError(f"no shape '{name}': choose from {', '.join(shape_names())}")
    found = json.loads(file.read_text())
    return Shape(name, found["description"], {role: found[role] for role in (*ROLES, EAGLE) if role in found})


def model_folders(shape: Shape, below: Path) -> dict[str, Path]:
    """Role -> a folder that vLLM loads; those of random weights hold a config.json and are written into `below`."""
    if shape.has_weights:
        return {role: demo_folder(role) for role in ROLES}
    folders = {}
    for role in shape.configs:
        folders[role] = below / role
        folders[role].mkdir(parents=True)
        (folders[role] / "config.json").write_text(json.dumps(shape.configs[role]))
    return folders
