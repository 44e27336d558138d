"""Where the figures of an HTML page come from: each machine once, and whose figures it gave."""

import json
import re
from pathlib import Path

import pytest

from specattn_vllm import cli
from specattn_vllm.tools.provenance import different

RESULTS = Path(__file__).parents[2] / "docs/results"


def test_each_source_is_there_once_with_the_names():
    one, other = {"gpu": "A", "commit": "1"}, {"gpu": "B", "commit": "1"}
    assert different([("x", one), ("y", other), ("z", {"commit": "1", "gpu": "A"})]) == [
        (["x", "z"], one),
        (["y"], other),
    ]
    assert different([]) == []


@pytest.mark.parametrize("file", ["cpu-guarantee-rounds.json", "h200-sketch-engine.json"])
@pytest.mark.parametrize("alike", [True, False])
def test_machines_are_named_where_there_are_several(tmp_path, file, alike):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    report = json.loads((RESULTS / file).read_text())
    kept = report["results" if "results" in report else "engines"]
    for number, result in enumerate(kept):
        result["provenance"] = report["provenance"] | ({} if alike else {"commit": f"{min(number, 1)}"})
    (tmp_path / file).write_text(json.dumps(report))
    assert cli.main(["report", str(tmp_path / file), "--out", str(tmp_path / "page.html")]) == 0
    told = re.findall(r"<summary>Machine and versions(.*?)</summary>", (tmp_path / "page.html").read_text())
    if alike:
        assert told == [""]
    else:
        first, others = told
        assert first.startswith(" of ") and ";" not in first and others.count(";") == len(kept) - 2
