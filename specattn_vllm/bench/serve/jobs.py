"""From what is asked for to one job per server: exact arguments of `vllm serve`, and environment."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specattn_vllm.bench import jobs as modes
from specattn_vllm.bench import sizes
from specattn_vllm.bench.jobs import MODES
from specattn_vllm.bench.serve.schema import ServeJob, Traffic
from specattn_vllm.tools.models import DEMO, EAGLE, Shape

DEFAULT_MODES = ("plain", "sketch-alone")


def models_of(args: argparse.Namespace) -> dict[str, str]:
    """Role -> model, for real weights. ValueError where a mode lacks the model that it drafts with."""
    target = args.target or DEMO
    drafts = {"draft": args.draft or (DEMO if target == DEMO else None), EAGLE: args.eagle}
    found = {"target": target}
    for mode in args.modes:
        role = MODES[mode].drafter
        if role in drafts:
            if drafts[role] is None:
                without = ", ".join(name for name, other in MODES.items() if other.drafter not in drafts)
                raise ValueError(f"--modes {mode}: it has a drafter: give --{role} MODEL, or take {without}")
            found[role] = drafts[role]
    return found


def make_jobs(
    args: argparse.Namespace, models: Mapping[str, str], shape: Shape | None, traffic: Traffic
) -> list[ServeJob]:
    """One per mode, and per kept share of the modes that keep one. ValueError for what no server does."""
    drafted = modes.by_mode(args, "draft-tokens", modes.DRAFT_TOKENS)
    lengths = modes.by_mode(args, "acceptance-length", modes.ACCEPTANCE_LENGTH)
    if args.acceptance_length and shape is None:
        raise ValueError("--acceptance-length is for --shape: models with weights accept what they accept")
    jobs = [_job(args, models, shape, traffic, *of, drafted, lengths) for of in modes.each_mode(args)]
    modes.refuse_unused_options(args, jobs)
    return jobs


def _job(
    args: argparse.Namespace,
    models: Mapping[str, str],
    shape: Shape | None,
    traffic: Traffic,
    mode: str,
    kept: float | None,
    drafted: Mapping[str, int],
    lengths: Mapping[str, float],
) -> ServeJob:
    kind = MODES[mode]
    if shape is not None:
        modes.check_drafter(mode, shape)
    arguments: dict[str, Any] = {
        "max_num_seqs": args.max_num_seqs,
        "max_model_len": max(args.input_len) + args.output_len + sizes.slack_tokens(max(drafted.values())),
    }
    if shape is not None:
        arguments["load_format"] = "dummy"
    if args.device == "cpu":  # as scripts/serve
        arguments |= {"dtype": "float32", "enforce_eager": True, "max_num_batched_tokens": 2048}
    if kind.drafter:
        length = lengths.get(mode, lengths[""]) if shape is not None else None
        arguments["speculative_config"] = modes.speculation(mode, kind.drafter, drafted.get(mode, drafted[""]), length)
    if kind.options is not None:
        # The method's defaults, as users have them; but no layer map is made for random weights.
        taken = ("method",) if shape is None else ("method", "layer_map")
        options = {name: value for name, value in kind.options.items() if name in taken}
        arguments |= modes.backend(mode, options, kept, dict(args.option))
    variables = modes.environment(mode) | {"VLLM_LOGGING_LEVEL": "INFO"}  # the log says which runner it is
    if mode == "plain":
        del variables["VLLM_USE_V2_MODEL_RUNNER"]  # as vLLM comes
    if all(name == DEMO or Path(name).expanduser().is_dir() for name in models.values()):
        variables["HF_HUB_OFFLINE"] = "1"
    return ServeJob(
        name=modes.name_of(mode, kept),
        mode=mode,
        kept=kept,
        shape=shape.name if shape is not None else None,
        models={role: models[role] for role in ("target", kind.drafter) if role in models},
        engine_arguments=arguments | dict(args.engine_argument),
        environment=variables,
        on_cpu=args.device == "cpu",
        stock=mode == "plain",
        traffic=traffic,
        ready_check_timeout_sec=args.ready_check_timeout_sec,
    )


def flags(arguments: Mapping[str, Any]) -> list[str]:
    """Of `vllm serve`: {'enforce_eager': True, 'max_num_seqs': 8} -> ['--enforce-eager', '--max-num-seqs', '8']."""
    found = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{'' if value else 'no-'}{flag}")
        else:
            found += [f"--{flag}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return found
