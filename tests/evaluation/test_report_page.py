"""The HTML page of evaluations: where marks stand, what is escaped, that nothing is loaded, what is refused."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from specattn_vllm import cli
from specattn_vllm.evaluation import page
from specattn_vllm.evaluation.report import differences, markdown
from specattn_vllm.evaluation.results import Report

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

MEASURED = Path(__file__).parents[2] / "docs/results/h200-real-4k.json"


VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Elements that are open, all that were, and addresses that something would be loaded from."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.seen, self.addresses, self.cells = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def svg(address: str) -> str:
    return base64.b64decode(address.removeprefix("data:image/svg+xml;base64,")).decode()


def written(tmp_path, *reports: dict) -> str:
    files = []
    for number, report in enumerate(reports):
        files.append(tmp_path / f"report-{number}.json")
        files[-1].write_text(json.dumps(report))
    out = tmp_path / "page.html"
    assert cli.main(["report", *map(str, files), "--out", str(out)]) == 0
    return out.read_text()


def test_the_page_of_what_was_measured(tmp_path):
    report = json.loads(MEASURED.read_text())
    text = written(tmp_path, report, report)
    page = Page(text)
    assert page.open == []
    assert all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"https?://|@import|url\(", text)
    names = [result["name"] for result in report["results"]]
    # In the table, and in the differences from every other; both for each file.
    assert all(page.cells.count(name) == 2 * len(names) for name in names)
    [one, other] = [attributes["src"] for tag, attributes in page.seen if tag == "img"]
    assert one == other
    drawn = svg(one)
    assert all(drawn.count(f">{name}<") == 1 for name in ("mean and std", "quest"))
    assert ">dense<" not in drawn, "lossless"
    # What the tables show, intervals included.
    measured = Report.model_validate(report)
    for line in markdown(measured).splitlines()[2:]:
        assert all(page.cells.count(cell) >= 2 for cell in line.strip("| ").split(" | ") if line.startswith("|"))
    for line in differences(measured, "specattn 20%").splitlines()[2:]:
        assert all(page.cells.count(cell) >= 2 for cell in line.strip("| ").split(" | ") if line.startswith("|"))


def test_differences_that_zero_is_not_in_the_interval_of_stand_out(tmp_path):
    report = json.loads(MEASURED.read_text())
    report["results"] = [report["results"][n] for n in (0, 2)]
    dense, pruned = report["results"]
    # Always worse by as much, now better and now worse, and as good.
    for number, (before, after) in enumerate(zip(dense["documents"], pruned["documents"], strict=True)):
        after["kl"] = before["kl"] + 0.5
        after["agreement"] = before["agreement"] - 0.25
        after["nll"] = before["nll"] + (-1) ** number
    text = written(tmp_path, report)
    assert text.count('<td class="sure">+0.5000 (+0.5000 to +0.5000)</td>') == 1
    assert text.count('<td class="sure">-25.00% (-25.00% to -25.00%)</td>') == 1
    assert re.search(r"<td>\+0\.\d+ \(-0\.\d+ to \+0\.\d+\)</td>", text)


@pytest.mark.parametrize(("documents", "sure"), [(2, False), (5, False), (6, True)])
def test_few_documents_make_no_difference_sure(tmp_path, documents, sure):
    report = json.loads(MEASURED.read_text())
    report["results"] = [report["results"][n] for n in (0, 2)]
    report["setup"]["documents"] = report["setup"]["documents"][:documents]
    for result in report["results"]:
        result["documents"] = result["documents"][:documents]
    for before, after in zip(*(result["documents"] for result in report["results"]), strict=True):
        after["kl"] = before["kl"] + 0.5
    text = written(tmp_path, report)
    assert ('class="sure"' in text) is sure
    assert (f"None is called sure of {documents} documents" in text) is not sure
    assert ("None is called sure" in differences(Report.model_validate(report), "dense")) is not sure


def test_every_table_says_beside_the_name_what_is_lossless(tmp_path):
    report = json.loads(MEASURED.read_text())
    text = written(tmp_path, report)
    heads = re.findall(r"<tr><th>method</th><th>(.*?)</th>", text)
    assert heads == ["lossless"] * (1 + len(report["results"]))
    for result in report["results"]:
        name, told = re.escape(result["name"].replace("&", "&amp;")), "yes" if result["lossless"] else "no"
        rows = re.findall(rf"<td[^>]*>{name}</td><td[^>]*>(\w+)</td>", text)
        assert rows == [told] * len(report["results"]), result["name"]


def test_pictures_have_no_white_on_a_dark_page(tmp_path):
    text = written(tmp_path, json.loads(MEASURED.read_text()))
    dark = text[text.index("@media (prefers-color-scheme: dark)") :].split("\n}")[0]
    assert re.search(r"\.charts \{ filter: invert\(1\)[^}]*mix-blend-mode: screen", dark)


def test_names_are_shown_as_they_are_and_run_nothing(tmp_path):
    report = json.loads(MEASURED.read_text())
    report["results"][3]["name"] = "<script>alert(1)</script> & more"
    text = written(tmp_path, report)
    assert "<script>alert" not in text
    assert "<script>alert(1)</script> & more" in Page(text).cells


def test_a_report_of_lossless_settings_alone_has_no_charts(tmp_path):
    report = json.loads(MEASURED.read_text())
    report["results"] = [result for result in report["results"] if result["lossless"]]
    assert not any(tag == "img" for tag, _ in Page(written(tmp_path, report)).seen)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{}", "is no report of `specattn eval methods`"),
        (Report(provenance={}, setup={}, results=[]).model_dump_json(), "no dense run in it"),
    ],
)
def test_what_is_no_report_is_refused(text, message, tmp_path, capsys):
    path = tmp_path / "report.json"
    if text is not None:
        path.write_text(text)
    out = tmp_path / "report.html"
    assert cli.main(["report", str(path), "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("specattn 12.5%", "specattn"),
        ("vegas 10%, dilation 0", "vegas, dilation 0"),
        ("specattn 0.95 x 1, floor 0", "specattn 0.95 x 1, floor 0"),
        ("specattn, as published", "specattn, as published"),
    ],
)
def test_a_family_is_the_name_without_the_size(name, expected):
    assert page.family(name) == expected
