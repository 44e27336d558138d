"""What docs/layer-maps.md says of the two criteria, against what was measured."""

import json
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_what_the_criteria_are_worth():
    measured = json.loads((DOCS / "results" / "real-layer-maps.json").read_text())["by_share_read"]
    by_kl, by_mass = (
        " and ".join(f"{measured[name][share]:.3f}" for share in ("0.25", "0.125"))
        for name in ("`--similarity kl`", "`--similarity retained` (`--path free`)")
    )
    said = " ".join((DOCS / "layer-maps.md").read_text().split())
    assert f"was {by_kl} with the map by KL, and {by_mass} with the map by retained attention" in said
