"""What docs/layer-maps.md says of the two criteria, against what was measured."""

import json
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_what_the_criteria_are_worth():
    results = json.loads((DOCS / "results" / "h200-real-methods.json").read_text())["results"]
    kl = {row["name"]: f"{row['figures']['kl']['value']:.3f}" for row in results if row["figures"]["kl"]}
    papers, retained = (
        [kl[f"{method} 20%{more}"] for method in ("specattn", "sts")] for more in ("", ", map by retained attention")
    )
    said = " ".join((DOCS / "layer-maps.md").read_text().split())
    assert f"is {papers[0]} with the papers' map for `specattn` and {retained[0]} with a map by retained" in said
    assert f"For `sts` it is {papers[1]} and {retained[1]} " in said
    assert f"has {kl['sketch 20%']} with as many bytes" in said


def test_the_maps_are_by_the_criteria_that_the_page_names():
    for name, criterion in (("real-map-retained", "retained"), ("real-map-retained-sts", "retained")):
        provenance = json.loads((DOCS / "settings" / f"{name}.json").read_text())["provenance"]
        assert provenance["settings"]["criterion"] == criterion
