"""Which settings of the plugin are compared: the default list, or a file's."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from specattn_vllm import layer_map
from specattn_vllm.causes import summary
from specattn_vllm.evaluation.schema import DENSE_OPTIONS, Setting
from specattn_vllm.installed import UserError
from specattn_vllm.options import SpecAttnOptions

DENSE = Setting(name="dense", options=DENSE_OPTIONS)
SINK = 4


def default_settings(context: int) -> list[Setting]:
    """For prompts of `context` tokens: what a budget without any choice takes is a number of tokens in the options."""
    # Verification that reads the first and the last tokens (Xiao et al., arXiv 2309.17453): attention chooses nothing,
    # as what is kept anyway holds more than a millionth of it.
    ends = {"method": "specattn", "top_p": 1e-6, "min_tokens": 0, "sink_tokens": SINK}
    ends["recent_tokens"] = max(1, round(context * 0.25) - SINK)
    baselines = {"quest": "quest", "mean_std": "mean and std", "channels": "channels", "oracle": "oracle"}
    return [
        DENSE,
        Setting(name="dense, another batch shape", options=DENSE_OPTIONS, other_batches=True),
        Setting(name="sketch", options={"method": "sketch"}),
        Setting(name="sketch 8%", options={"method": "sketch", "ratio": 0.08, "min_tokens": 0}),
        Setting(name="specattn", options={"method": "specattn"}),
        Setting(name="specattn, as published", options={"method": "specattn", "preset": "paper"}),
        Setting(name="sts", options={"method": "sts"}),
        Setting(name="sts, as published", options={"method": "sts", "preset": "paper"}),
        Setting(name="first and last 25%", options=ends),
        Setting(name="vegas 10%", options={"method": "vegas", "ratio": 0.1, "min_tokens": 0}),
        Setting(name="streamingllm 10%", options={"method": "streamingllm", "ratio": 0.1, "min_tokens": 0}),
        *(
            Setting(name=f"{name} 25%", options=DENSE_OPTIONS, baseline={"name": baseline, "ratio": 0.25})
            for baseline, name in baselines.items()
        ),
    ]


def read_settings(path: Path) -> list[Setting]:
    """A JSON file: [{"name": ..., "options": {...}}, ...]."""
    try:
        return TypeAdapter(list[Setting]).validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"--settings {path}: {error.strerror}") from None
    except ValidationError as error:
        raise UserError(
            f"--settings {path}: {summary(error)} It is a list of settings: "
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
        if setting.baseline is not None or getattr(options, "layer_map", "it has none") is not None:
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
