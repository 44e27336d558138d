"""The map's fields from what was measured, and the map as a file."""

from __future__ import annotations

import json
import re
from typing import Any

import torch

from specattn_vllm.calibrate.paths import head_map, layer_path
from specattn_vllm.calibrate.shares import GRID, cost_at, divide, least_budget, relative
from specattn_vllm.installed import UserError

LEAST = 0.02
"""Of the attention that a selection loses, what has to be won back for a layer to count as copying. Of the demo pair
the fifth wins 5%, and the others lose more than before."""
Layers = list[int | None]
Heads = list[list[int] | None] | None


def layer_and_head_map(
    alike: dict[str, torch.Tensor], path: str, dense_layers: int, ranks: int
) -> tuple[Layers, Heads]:
    """alike: means of `similarity_of_window` or `retained_of_window`. Heads are None where they were not compared."""
    layers: Layers = [None] * dense_layers + layer_path(alike["layers"][dense_layers:], path)
    if "heads" not in alike:
        return layers, None
    return layers, [None if i is None else head_map(alike["heads"][j, i], ranks) for j, i in enumerate(layers)]


def allocation(
    cost: dict[str, torch.Tensor], kind: str, budget: float, dense_above: float | None, layers: Layers, heads: Heads,
    retain: float | None = None,
) -> tuple[Layers, Heads, list[float | None], dict[str, Any]]:  # fmt: skip
    """Layers and heads, without those that stay dense, shares of the budget, and what the map's provenance tells of it.

    cost: means of `cost_of_window`; kind: 'kl' or 'mass', whichever is to be kept low or lost least. retain: share of
    the layers' attention, in the place of the budget, which is then the least that retains so much on average.
    """
    curves = {j: curve(cost, kind, j) for j, i in enumerate(layers) if i is not None}
    if dense_above is not None:
        curves = {j: points for j, points in curves.items() if cost_at(points, budget) <= dense_above}
        if not curves:
            raise UserError(f"--dense-above {dense_above}: every layer costs more, so nothing would be pruned")
        layers = [i if j in curves else None for j, i in enumerate(layers)]
        heads = heads and [row if j in curves else None for j, row in enumerate(heads)]
    lost = [curve(cost, "mass", j) for j in curves]
    if retain is not None:
        budget = least_budget([*curves.values()], lost, 1 - retain)
    given = divide([*curves.values()], budget)
    by_layer = dict(zip(curves, relative(given), strict=True))
    shares = [by_layer.get(j) for j in range(len(layers))]
    told: dict[str, Any] = {"grid": list(GRID)}
    for name in ("read", "mass", "kl") if kind == "kl" else ("read", "mass"):
        told[name] = [_digits(row) if layers[j] is not None else None for j, row in enumerate(cost[name].tolist())]
    told["budget"], told["retained"] = budget, _digits([1 - sum(map(cost_at, lost, given)) / len(given)])[0]
    told["cost_of_equal_shares"] = _digits([sum(cost_at(points, budget) for points in curves.values())])[0]
    told["cost_of_shares"] = _digits([sum(map(cost_at, curves.values(), given))])[0]
    return layers, heads, shares, {"curves": told}


def copying(mass: dict[str, torch.Tensor] | None, layers: int) -> list[bool]:
    """Target layers in which what follows the rounds' tokens makes up for a part of what a selection loses, LEAST of it
    or more. mass: means of `induction_of_window`, None where it was not measured."""
    if mass is None:
        return [False] * layers
    gained = mass["followed"] - mass["alone"]
    return (gained > LEAST * (1 - mass["alone"])).tolist()


def curve(cost: dict[str, torch.Tensor], kind: str, layer: int) -> list[tuple[float, float]]:
    """(share of the context read, cost) of one layer; the always kept tokens bound the share from below."""
    costs = cost["kl"][layer] if kind == "kl" else 1 - cost["mass"][layer]
    return [*zip(cost["read"][layer].tolist(), costs.tolist(), strict=True), (1.0, 0.0)]


def _digits(values: list[float]) -> list[float]:
    """Four significant digits."""
    return [float(f"{value:.4g}") for value in values]


def as_json(found: dict[str, Any]) -> str:
    """Indented, with innermost lists on a line."""

    def on_a_line(match: re.Match) -> str:
        return "[" + " ".join(match[1].split()) + "]"

    return re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", on_a_line, json.dumps(found, indent=1)) + "\n"
