"""Runs a calibration: from the command's arguments to the map."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shlex
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import specattn_vllm
from specattn_vllm.calibrate import models, text
from specattn_vllm.calibrate.maps import as_json, head_map, layer_path
from specattn_vllm.calibrate.similarity import EPSILON, sampled_queries, similarity_of_window
from specattn_vllm.calibrate.state import State
from specattn_vllm.fingerprint import fingerprint
from specattn_vllm.installed import UserError
from specattn_vllm.layer_map import SCHEMA, LayerMap
from specattn_vllm.methods import METHODS
from specattn_vllm.tools.outputs import write_whole

SETTINGS = ("method", "criterion", "budget", "window", "windows", "dense_layers", "ranks", "queries", "seed")
"""Arguments that change the map, besides models, text and dtype."""


def calibrate(args: argparse.Namespace, state_file: Path) -> dict[str, Any]:
    """Measure, write the map to `args.out`, and return its contents. `state_file` may hold the measurements of an
    interrupted run. Raises UserError if something cannot be done."""
    folders = {"target": models.find("target", args.target), "draft": models.find("draft", args.draft)}
    _check_fit(args, models.check(folders))
    device = _device(args.device)
    dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    settings = {name: getattr(args, name) for name in SETTINGS} | {"dtype": dtype}
    windows = _windows(args, models.tokenizer_of(folders))
    facts = {role: fingerprint(folder) for role, folder in folders.items()}
    key = json.dumps([facts, windows.digest, settings, specattn_vllm.__version__])
    if args.overwrite:
        state_file.unlink(missing_ok=True)
    state = State(state_file, hashlib.sha256(key.encode()).hexdigest())
    target, draft = (models.load(folders[role], device, getattr(torch, dtype)) for role in ("target", "draft"))
    _measure(args, target, draft, windows.ids, state)
    alike = {name: value / len(windows.ids) for name, value in state.sums.items()}
    if args.criterion == "retained" and "heads" in alike:
        alike["layers"] = alike["heads"].amax(-1).mean(-1)  # each KV head chooses alone: what counts is the best ones
    # The papers' path never steps back. Retained attention is compared at the budget itself, and needs no such guard.
    best = layer_path if args.criterion == "papers" else head_map
    layers = [None] * args.dense_layers + best(alike["layers"][args.dense_layers :])
    similarity, heads = {"similarity": _rounded(alike["layers"])}, None
    if "heads" in alike:
        of_mapped = [None if i is None else alike["heads"][j, i] for j, i in enumerate(layers)]
        heads = [None if one is None else head_map(one, args.ranks or 1) for one in of_mapped]
        similarity["head_similarity"] = [None if one is None else _rounded(one) for one in of_mapped]
    provenance = {
        "command": _command(args, settings),
        "text": windows.files,
        "token_ids_sha256": windows.digest,
        "windows": len(windows.ids),
        "tokens": windows.ids.numel(),
        "settings": settings,
        "epsilon": EPSILON,
        **similarity,
        "versions": {
            "specattn-vllm": specattn_vllm.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    found = {"schema": SCHEMA, "method": args.method, "calibrated": True, **facts, "layers": layers, "heads": heads}
    found["provenance"] = provenance
    LayerMap.model_validate(found)
    write_whole(args.out, as_json(found))
    state_file.unlink()
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

    # The tokens that the tokenizer puts before every text, for example BOS.
    first = tokenizer("", verbose=False).input_ids
    return text.windows(args.text or [text.DEMO_TEXT], tokenize, first, args.window, args.windows)


def _measure(
    args: argparse.Namespace, target: torch.nn.Module, draft: torch.nn.Module, ids: torch.Tensor, state: State
) -> None:
    """Measure the windows `ids` [windows, tokens] that the state does not have yet, and add them to it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("windows", total=len(ids), completed=state.windows)
        for index in range(state.windows, len(ids)):
            queries = sampled_queries(args.window, args.queries, args.seed, index)
            parts = METHODS[args.method].map_keys
            found = similarity_of_window(target, draft, ids[index], queries, "heads" in parts, args.budget)
            if found["layers"].isnan().any():
                raise UserError("the models' attention overflows: give --dtype bfloat16 or float32, or other weights")
            state.add(found)
            progress.advance(task)


def _command(args: argparse.Namespace, settings: dict[str, Any]) -> str:
    """The command that makes this map, with names instead of paths, because paths would tell a reader nothing."""
    words = ["specattn", "calibrate", "--target", Path(args.target).name, "--draft", Path(args.draft).name]
    if args.text:
        words += ["--text", *(path.name for path in args.text)]
    for name, value in settings.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join([*words, "--out", args.out.name])


def _rounded(values: torch.Tensor) -> list:
    if values.dim() > 1:
        return [_rounded(row) for row in values]
    return [round(value, 4) for value in values.tolist()]
