"""Launch configurations of the two attention kernels: the best of each shape, as constants ready to paste.

A full product of the fields would be hundreds of compilations of a second or two. Fields are varied one after another
instead, each from the best so far, in turns for as long as something improves and the time lasts.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple

import torch

from specattn_vllm.bench import kernel_draft, kernel_shapes
from specattn_vllm.bench.kernel_bench import Bench, Calls, Skip
from specattn_vllm.bench.kernel_data import page_table, random_positions, requests
from specattn_vllm.bench.kernel_report import Row
from specattn_vllm.bench.kernel_shapes import FIRST_STEP_LEN, VERIFY_LEN, Batch, Pair

# Values of a field by its name in LaunchConfig, the most telling field first; other fields stay as they are.
CANDIDATES: dict[str, tuple[int, ...]] = {
    "block_n": (32, 64, 128),
    "num_stages": (2, 3, 4),
    "num_warps": (2, 4, 8),
    "waves": (2, 3, 4, 6, 8),
    "block_m": (16, 32, 64),
}
GAIN = 0.99  # a configuration has to be a hundredth faster than another to be preferred
KEPT = 0.1


class Case(NamedTuple):
    """make(config) -> calls; config None is the kernel's own choice."""

    module: str
    name: str
    shape: str
    nbytes: int
    make: Callable[[Any], Calls]


def sweep(
    bench: Bench,
    batch: Batch,
    pairs: Sequence[Pair],
    only: Sequence[str],
    lines: list[str],
    save: Callable[[], None],
) -> None:
    """Append the constants of each case to `lines`, and print and save them as they are found."""
    cases = []
    if "verify" in only:
        cases += [partial(_verify_case, bench, batch, pairs[0], groups) for groups in (pairs[0].target.kv, 1)]
    if "draft" in only:
        cases += [partial(_draft_case, bench, batch, pair, n) for pair in pairs for n in (FIRST_STEP_LEN, 1)]
    for i, build in enumerate(cases):
        left = bench.seconds - (time.monotonic() - bench.started)
        found = _best_of(bench, build(), time.monotonic() + max(left, 0.0) / (len(cases) - i))
        lines += found
        save()
        print("\n".join(found), end="\n" if found else "", flush=True)


def _draft_case(bench: Bench, batch: Batch, pair: Pair, q_len: int) -> Case:
    heads = pair.draft
    layers = bench.arena.layers(heads, batch)
    step = kernel_draft.make_step(bench, heads, batch, q_len)
    scores = kernel_draft.score_buffers(bench, heads, batch, torch.float32)

    def make(config: Any) -> Calls:
        more = {} if config is None else {"config": config}
        return step.calls(bench.operation("draft_attention"), layers, scores, **more)

    nbytes = kernel_shapes.dense_bytes(heads, batch, q_len, bench.element)
    nbytes += kernel_shapes.score_bytes(heads, batch.rows, batch.context, 4)
    return Case("draft_attention", "draft_attention + fp32 scores", f"{batch} {heads} q{q_len}", nbytes, make)


def _verify_case(bench: Bench, batch: Batch, pair: Pair, groups: int) -> Case:
    heads = pair.target
    layers = bench.arena.layers(heads, batch)
    req = requests(heads, batch, VERIFY_LEN, bench.device, bench.dtype)
    kept = kernel_shapes.kept_tokens(batch.context, KEPT)
    positions = random_positions(batch, groups, kept, bench.device)
    count = torch.full((batch.rows, groups), kept, dtype=torch.int32, device=bench.device)

    def make(config: Any) -> Calls:
        from specattn_vllm.selection.pages import page_strides

        more = {} if config is None else {"config": config}
        table = page_table(positions, req.block_table, page_strides(layers[0]), batch.context)
        sparse = bench.operation("sparse_attention")
        return [
            partial(
                sparse, req.query, layer, table, count, req.query_start_loc, heads.size**-0.5, req.out, VERIFY_LEN,
                **more,
            )
            for layer in layers
        ]  # fmt: skip

    nbytes = kernel_shapes.sparse_bytes(heads, batch, VERIFY_LEN, bench.element, kept, groups)
    name = f"sparse_attention {KEPT:.0%}, {'per head' if groups > 1 else 'shared'}"
    return Case("sparse_attention", name, f"{batch} {heads} q{VERIFY_LEN}", nbytes, make)


def chosen_config(module: Any, call: Callable[[], object]) -> tuple[Any, tuple]:
    """The configuration that a call of the module's kernel picks by itself, and what it was picked by.

    Both kernels ask a function of their module for it; asking it in their stead would repeat how they call it here.
    """
    for name in ("launch_config", "default_config"):
        pick = getattr(module, name, None)
        if pick is None:
            continue
        seen = []

        def watched(*arguments: Any, pick=pick, seen=seen) -> Any:
            seen.append((pick(*arguments), arguments))
            return seen[-1][0]

        setattr(module, name, watched)
        try:
            call()
        finally:
            setattr(module, name, pick)
        if seen:
            return seen[-1]
    raise Skip(f"{module.__name__} has no launch_config or default_config that picks a LaunchConfig")


def descend(start: Any, time_of: Callable[[Any], float | None], deadline: float) -> tuple[Any, float | None]:
    """The best configuration found by varying one field after another, and its time. time_of: None where one fails."""
    names = {field.name for field in fields(start)}
    tried: dict[Any, float | None] = {start: time_of(start)}
    top = start
    improved = True
    while improved and time.monotonic() < deadline:
        improved = False
        for key, values in CANDIDATES.items():
            if key not in names:
                continue
            for value in values:
                config = replace(top, **{key: value})
                if config in tried or time.monotonic() >= deadline:
                    continue
                tried[config] = time_of(config)
                if tried[config] is not None and (tried[top] is None or tried[config] < GAIN * tried[top]):
                    top, improved = config, True
    return top, tried[top]


def _best_of(bench: Bench, case: Case, deadline: float) -> list[str]:
    base = bench.measure("sweep", f"{case.name}: as it is", case.shape, partial(case.make, None), case.nbytes)
    if base.ms is None:
        return []
    module = importlib.import_module(f"specattn_vllm.kernels.{case.module}")
    try:
        start, key = chosen_config(module, case.make(None)[0])
    except Skip as reason:
        base.add_note(str(reason))
        return []
    rows: dict[Any, Row] = {}

    def time_of(config: Any) -> float | None:
        if config == start:
            return base.ms
        text = " ".join(f"{field.name}={getattr(config, field.name)}" for field in fields(config))
        rows[config] = bench.measure(
            "sweep", f"{case.name}: {text}", case.shape, partial(case.make, config), case.nbytes, base
        )
        return rows[config].ms

    top, ms = descend(start, time_of, deadline)
    gpu = torch.cuda.get_device_name(bench.device) if bench.cuda else "CPU"
    gain = f"{base.ms / ms:.2f}x the one before" if top != start else "nothing tried was faster"
    by = ", ".join(str(value) for value in key if not isinstance(value, torch.Tensor))
    return [
        f"# {gpu}, {case.name}, {case.shape}: {ms:.4f} ms, {gain} ({len(rows)} tried), {datetime.now(UTC):%Y-%m-%d}",
        f"{f'({by}): ' if by else ''}{top!r},",
    ]
