"""The section of servers on the HTML page: every figure of the report is in its table."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

from specattn_vllm import cli
from specattn_vllm.bench.serve.report import markdown
from specattn_vllm.bench.serve.schema import ServeReport

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

RESULTS = Path(__file__).parents[2] / "docs/results"
SERVED = RESULTS / "cpu-serve.json"


def page(tmp_path, *files: Path) -> str:
    out = tmp_path / "page.html"
    assert cli.main(["report", *map(str, files), "--out", str(out)]) == 0
    return out.read_text()


def test_the_page_has_every_figure_of_servers(tmp_path):
    text = page(tmp_path, SERVED)
    cells = [html.unescape(re.sub("<.*?>", "", cell)) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", text, re.S)]
    report = ServeReport.model_validate_json(SERVED.read_text())
    table, *below = markdown(report).strip().split("\n\n")
    wanted = [cell for line in table.splitlines()[2:] for cell in line.strip("| ").split(" | ")]
    assert len(wanted) > 50
    assert [cell for cell in wanted if cells.count(cell) < wanted.count(cell)] == []
    words = " ".join(html.unescape(re.sub("<.*?>", "", text)).split())
    assert all(" ".join(paragraph.split()) in words for paragraph in below)
    assert text.count('class="losing"') == table.count("†") > 0


def test_servers_beside_engines(tmp_path):
    text = page(tmp_path, RESULTS / "h200-fp8.json", SERVED)
    assert "<h1>How fast it decodes, and how servers answer under load</h1>" in text
    assert text.count("<section>") == 2


def test_a_damaged_report_of_servers_is_refused(tmp_path, capsys):
    report = json.loads(SERVED.read_text())
    del report["settings"]["request_rate"]
    file = tmp_path / "served.json"
    file.write_text(json.dumps(report))
    assert cli.main(["report", str(file), "--out", str(tmp_path / "page.html")]) == 2
    assert "served.json cannot be shown: it lacks what such reports have" in capsys.readouterr().err
