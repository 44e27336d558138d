"""Which settings of the plugin are compared: the default list, or a file's."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from specattn_vllm import layer_map
from specattn_vllm.evaluation.schema import DENSE_OPTIONS, Setting
from specattn_vllm.installed import UserError
from specattn_vllm.options import SpecAttnOptions

DENSE = Setting(name="dense", options=DENSE_OPTIONS)
SINK = 4


def default_settings(context: int) -> list[Setting]:
    """For prompts of `context` tokens: what a budget without any choice takes is a number of tokens in the options."""
    return [
        DENSE,
        Setting(name="dense, another batch shape", options=DENSE_OPTIONS, other_batches=True),
        Setting(name="dense, sparse_draft", options={"method": "dense", "sparse_draft": True}),
        Setting(name="sketch", options={"method": "sketch"}),
        Setting(name="sketch 8%", options={"method": "sketch", "ratio": 0.08, "min_tokens": 0}),
        Setting(name="specattn", options={"method": "specattn"}),
        Setting(name="specattn, sparse_draft", options={"method": "specattn", "sparse_draft": True}),
        # As the benchmark of speed runs.
        Setting(
            name="specattn 10%, sparse_draft",
            options={"method": "specattn", "rule": "top_k", "ratio": 0.1, "min_tokens": 0, "sparse_draft": True},
        ),
        *(
            Setting(name=f"{method}, as published", options={"method": method, "preset": "paper"})
            for method in ("specattn", "sts")
        ),
        *(
            Setting(
                name=f"{method} {share * 100:g}%",
                options={"method": method, "rule": "top_k", "ratio": share, "min_tokens": 0},
            )
            for method, shares in (("specattn", (0.125, 0.05)), ("sts", (0.25, 0.125, 0.05)))
            for share in shares
        ),
        # What each part is worth.
        *(
            Setting(
                name=f"specattn 12.5%, {part} off",
                options={"method": "specattn", "rule": "top_k", "ratio": 0.125, "min_tokens": 0, part: False},
            )
            for part in ("induction", "layer_shares", "bonus_row")
        ),
        Setting(name="vegas, as published", options={"method": "vegas", "preset": "paper"}),
        Setting(name="vegas 10%", options={"method": "vegas", "ratio": 0.1, "min_tokens": 0}),
        Setting(
            name="vegas 10%, dilation 0", options={"method": "vegas", "ratio": 0.1, "min_tokens": 0, "dilation": 0}
        ),
        Setting(name="streamingllm 10%", options={"method": "streamingllm", "ratio": 0.1, "min_tokens": 0}),
        *(
            Setting(name=f"{name} {share * 100:g}%", options=DENSE.options, peer={**peer, "ratio": share})
            for name, shares, peer in (
                ("quest", (0.25, 0.125), {"name": "quest"}),
                ("mean and std", (0.25, 0.125), {"name": "mean_std"}),
                ("channels", (0.25, 0.125), {"name": "channels"}),
                ("oracle", (0.25, 0.125), {"name": "oracle"}),
                ("oracle, shared", (0.125,), {"name": "oracle", "shared": True}),
            )
            for share in shares
        ),
        Setting(name="oracle top-p 0.95", options=DENSE.options, peer={"name": "oracle", "top_p": 0.95}),
        Setting(name="sink and recent 25%", options=_streaming(context, 0.25)),
    ]


def _streaming(context: int, share: float) -> dict:
    """Verification that reads the first and the last tokens (Xiao et al., arXiv 2309.17453): attention chooses nothing,
    since what is kept anyway holds more than a millionth of it."""
    recent = max(1, round(context * share) - SINK)
    return {"method": "specattn", "top_p": 1e-6, "min_tokens": 0, "sink_tokens": SINK, "recent_tokens": recent}


def read_settings(path: Path) -> list[Setting]:
    """A JSON file: [{"name": ..., "options": {...}}, ...]."""
    try:
        return TypeAdapter(list[Setting]).validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"--settings {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "file"
        message = " ".join(first["msg"].removeprefix("Value error, ").split())
        raise UserError(
            f"--settings {path}: {place}: {message} It is a list of settings: "
            f"{json.dumps([{'name': 'half', 'options': {'rule': 'top_k', 'ratio': 0.5}}])} (docs/evaluation.md)"
        ) from None


def with_layer_map(settings: list[Setting], path: Path) -> list[Setting]:
    """The same, with that layer map where a draft model's attention chooses and no map is named."""
    try:
        layer_map.read(path)
    except layer_map.LayerMapError as error:
        raise UserError(f"--layer-map: {error}") from None

    def mapped(setting: Setting) -> Setting:
        options = SpecAttnOptions.parse(setting.options)
        if setting.peer is not None or not options.chooses_by_draft or options.layer_map is not None:
            return setting
        return setting.model_copy(update={"options": {**setting.options, "layer_map": str(path)}})

    return [mapped(setting) for setting in settings]


def chosen(settings: list[Setting], only: list[str]) -> list[Setting]:
    """The dense run first, which the others are compared with; of the others all, or those named."""
    names = [setting.name for setting in settings]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two settings are called {doubled.pop()!r}: every name stands once")
    if unknown := [name for name in only if name not in names]:
        raise UserError(f"--only {unknown[0]!r}: there is no such setting; there are {', '.join(map(repr, names))}")
    wanted = [setting for setting in settings if not only or setting.name in only]
    reference = next((setting for setting in settings if setting.is_reference), DENSE)
    if reference is DENSE and DENSE.name in [setting.name for setting in wanted if not setting.is_reference]:
        raise UserError(f"a setting is called {DENSE.name!r} and is not {DENSE.options}: give it another name")
    return [reference, *(setting for setting in wanted if not setting.is_reference)]
