"""What the documentation says of a real pair of models, against what was measured."""

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

from specattn_vllm.calibrate.paths import layer_path

HERE = Path(__file__).resolve().parent
FIGURES = json.loads((HERE / "real_pair.json").read_text())
DOCUMENT = (HERE.parents[1] / "docs" / "layer-maps.md").read_text()
RETAINED = FIGURES["retained"]
BEST = layer_path(RETAINED, "free")


def spans(layers: list[int]) -> str:
    """[1, 2, 3, 5] as "1 to 3, 5"."""
    found: list[list[int]] = []
    for layer in layers:
        if found and found[-1][-1] == layer - 1:
            found[-1].append(layer)
        else:
            found.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in found)


def test_the_table_of_what_is_retained():
    maps = [FIGURES["maps"][name] for name in ("--similarity kl", "--path monotone", "default")]
    by_kl, _, by_mass = maps
    groups: dict[tuple, list[int]] = {}
    for layer, pair in enumerate(zip(by_kl, by_mass, strict=True)):
        groups.setdefault(pair, []).append(layer)
    rows = [(spans(layers), *pair, layers) for pair, layers in groups.items()]
    for name, kl, mass, layers in [*rows, ("all", "", "", range(30))]:
        cells = [f"{sum(RETAINED[j][of[j]] for j in layers) / len(layers):.1%}" for of in (*maps, BEST)]
        assert f"| {name} | {kl} | {mass} | {' | '.join(cells)} |\n" in DOCUMENT


def test_what_heads_retain():
    by_overlap, by_mass = (
        sum(FIGURES["head_maps"][name]["retained"]) / 30
        for name in ("--method sts --similarity kl", "--method sts --budget 0.25")
    )
    assert f"{by_overlap:.1%} by `kl` and overlap, and {by_mass:.1%} by `retained`." in " ".join(DOCUMENT.split())


@pytest.mark.parametrize("name", FIGURES["kl_to_dense"]["by_share_read"])
def test_the_table_of_what_it_does_to_the_output(name):
    of = FIGURES["kl_to_dense"]["by_share_read"][name]
    assert f"| {name} | {of['0.25']:.3f} | {of['0.125']:.3f} |\n" in DOCUMENT


def test_the_monotone_map_steps_back_nowhere_and_the_other_does():
    assert FIGURES["maps"]["--path monotone"] == sorted(FIGURES["maps"]["--path monotone"])
    assert FIGURES["maps"]["default"] != sorted(FIGURES["maps"]["default"])
