"""A calibration from its arguments to the map."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import specattn_vllm
from specattn_vllm.calibrate import models, text
from specattn_vllm.calibrate.arguments import RETAINED, maps_heads
from specattn_vllm.calibrate.measure import (
    Chosen,
    cost_of_window,
    induction_of_window,
    over_windows,
    sampled_queries,
    similarity_of_window,
)
from specattn_vllm.calibrate.result import allocation, as_json, copying, layer_and_head_map
from specattn_vllm.calibrate.retained import retained_of_window
from specattn_vllm.calibrate.rounds import Rounds
from specattn_vllm.calibrate.similarity import EPSILON
from specattn_vllm.calibrate.state import State, state_file
from specattn_vllm.fingerprint import fingerprint
from specattn_vllm.installed import UserError
from specattn_vllm.layer_map import SCHEMA, LayerMap
from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.tools.outputs import write_whole


def calibrate(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, write the map to `args.out`, and return it as it stands there."""
    folders = {"target": models.find("target", args.target), "draft": models.find("draft", args.draft)}
    configs = models.check(folders)
    _check_fit(args, configs)
    device = _device(args.device)
    dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    windows = _windows(args, models.tokenizer_of(folders))
    facts = {role: fingerprint(folder) for role, folder in folders.items()}
    settings = _settings(args) | {"dtype": dtype}
    key = json.dumps([facts, windows.digest, settings, specattn_vllm.__version__])
    state = State(state_file(args.out), hashlib.sha256(key.encode()).hexdigest())
    if args.overwrite:
        state.remove()
    state.load()
    target, draft = (models.Model(folders[role], device, getattr(torch, dtype)) for role in ("target", "draft"))

    rounds, cost, mass = _rounds(args), None, None

    def alike_in(window: int) -> dict[str, torch.Tensor]:
        ids, names = windows.ids[window], ("layers", "heads") if maps_heads(args) else ("layers",)
        if args.similarity == RETAINED:
            served = replace(rounds, min_tokens=SpecAttnOptions.parse({"method": args.method}).min_tokens)
            return retained_of_window(target, draft, ids, served, args.budget, names)
        queries = sampled_queries(args.window, args.queries, args.seed, window)
        return similarity_of_window(target, draft, ids, queries, args.similarity, names)

    with _progress() as begin:
        alike = over_windows(
            state, "similarity", windows.ids, alike_in, begin("layers and heads", len(windows.ids))
        )  # fmt: skip
        layers, heads = layer_and_head_map(alike, args.path, args.dense_layers, args.ranks or 1)

        def chosen(window: int) -> Chosen:
            return Chosen.by(draft, windows.ids[window], rounds, layers, heads)

        if args.induction == "auto":
            mass = over_windows(
                state, "induction", windows.ids,
                lambda w: induction_of_window(target, chosen(w), args.budget),
                begin("which layers copy", len(windows.ids)),
            )  # fmt: skip
        induction = copying(mass, len(layers))
        if args.shares != "none":
            cost = over_windows(
                state, "cost", windows.ids,
                lambda w: cost_of_window(target, chosen(w), induction, args.shares == "kl"),
                begin("what reading less costs", len(windows.ids)),
            )  # fmt: skip
    shares, measured = None, {}
    if cost is not None:
        layers, heads, shares, measured = allocation(
            cost, args.shares, args.budget, args.dense_above, layers, heads, args.retain
        )
        induction = [copies and i is not None for copies, i in zip(induction, layers, strict=True)]
    found = {
        "schema": SCHEMA, "method": args.method, "calibrated": True, **facts,
        "layers": layers, "heads": heads, "shares": shares, "induction": induction if any(induction) else None,
        "provenance": {
            "command": _command(args), "text": windows.files, "token_ids_sha256": windows.digest,
            "windows": len(windows.ids), "tokens": windows.ids.numel(), "settings": settings,
            **({"epsilon": EPSILON} if args.similarity == "kl" else {}),
            "similarity": _rounded(alike["layers"]),
            **({"head_similarity": _of_mapped(alike["heads"], layers)} if "heads" in alike else {}), **measured,
            **({"retained": {name: _rounded(of) for name, of in mass.items()}} if mass is not None else {}),
            "versions": {"specattn-vllm": specattn_vllm.__version__, "python": platform.python_version(),
                         "torch": torch.__version__, "transformers": transformers.__version__},
        },
    }  # fmt: skip
    LayerMap.model_validate(found)
    write_whole(args.out, as_json(found))
    state.remove()
    return found


def _check_fit(args: argparse.Namespace, configs: dict[str, dict[str, Any]]) -> None:
    if args.dense_layers >= (layers := configs["target"]["num_hidden_layers"]):
        raise UserError(f"--dense-layers {args.dense_layers}: the target has {layers} layers")
    for role, config in configs.items():
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        if heads % (args.ranks or 1):
            raise UserError(f"--ranks {args.ranks}: does not divide the {heads} KV heads of the {role}")
        longest = config.get("max_position_embeddings")
        if longest is not None and args.window > longest:
            raise UserError(f"--window {args.window}: the {role} takes at most {longest} tokens")


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU; give --device cpu, or install a PyTorch with CUDA")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _windows(args: argparse.Namespace, tokenizer: Any) -> text.Windows:
    def tokenize(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False, verbose=False).input_ids

    # What the tokenizer puts before any text is what the models want there.
    first = tokenizer("", verbose=False).input_ids
    return text.windows(args.text or [text.DEMO_TEXT], tokenize, first, args.window, args.windows)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the measurements depend on, beside models and text."""
    names = (
        "method", "window", "windows", "similarity", "path", "dense_layers", "ranks", "queries",
        "shares", "induction", "budget", "retain", "dense_above", "rounds", "draft_tokens", "seed",
    )  # fmt: skip
    return {name: getattr(args, name) for name in names}


def _rounds(args: argparse.Namespace) -> Rounds:
    options = SpecAttnOptions.parse({"method": args.method})  # always kept tokens are a server's
    return Rounds(args.window, args.rounds, args.draft_tokens, options.sink_tokens, options.recent_tokens)


def _command(args: argparse.Namespace) -> str:
    """The command that makes this map: names, not paths, since where folders lay tells a reader nothing."""
    words = ["specattn", "calibrate", "--target", Path(args.target).name, "--draft", Path(args.draft).name]
    if args.text:
        words += ["--text", *(path.name for path in args.text)]
    for name, value in _settings(args).items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join([*words, "--out", args.out.name])


def _rounded(values: torch.Tensor, digits: int = 4) -> list:
    if values.dim() > 1:
        return [_rounded(row, digits) for row in values]
    return [round(value, digits) for value in values.tolist()]


def _of_mapped(similarity: torch.Tensor, layers: list[int | None]) -> list:
    return [None if i is None else _rounded(similarity[j, i]) for j, i in enumerate(layers)]


@contextmanager
def _progress() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Gives a function that begins a bar and returns what is told how many are done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:

        def begin(name: str, total: int) -> Callable[[int], None]:
            task = progress.add_task(name, total=total)
            return lambda done: progress.update(task, completed=done)

        yield begin
