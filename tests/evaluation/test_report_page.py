"""The HTML page of evaluations and of speed: where marks stand, what is escaped, that nothing is loaded, what is
refused; and that it can be read in the dark, without a mouse and without seeing it."""

from __future__ import annotations

import base64
import html
import itertools
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from specattn_vllm import cli
from specattn_vllm.bench import report as speed
from specattn_vllm.bench import schema
from specattn_vllm.evaluation.html import charts
from specattn_vllm.evaluation.report import differences, markdown
from specattn_vllm.evaluation.results import Report

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

RESULTS = Path(__file__).parents[2] / "docs/results"
MEASURED = RESULTS / "h200-real-4k.json"
SPEED = RESULTS / "h200-sketch-engine-128k.json"
"""With cells in which one of ours loses."""


VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Elements that are open, all that were, and addresses that something would be loaded from."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.seen, self.addresses, self.cells = [], [], [], []
        """cells: the text of each cell of a table's body, row headers too."""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "srcset")]
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & {*self.open}:
            self.cells[-1] += data


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
    pictures = [attributes for tag, attributes in page.seen if tag == "img" and attributes["alt"]]
    assert pictures[:3] == pictures[3:] and len(pictures) == 6
    for picture, heading in zip(pictures, charts.HEADINGS.values(), strict=False):
        assert f">{heading}<" in svg(picture["src"])
        assert all(f"{name} " in picture["alt"] for name in names if not name.startswith("dense"))
        assert "dense 1" not in picture["alt"], "lossless"
    legend = re.findall(r'<li><img src="[^"]*" alt="">(.*?)</li>', text)
    assert legend == 2 * ["sketch", "specattn", "quest", "mean and std", "channels", "oracle"]
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
    assert text.count('<td class="sure">+0.5000 <small>(+0.5000 to +0.5000)</small></td>') == 1
    assert text.count('<td class="sure">-25.00% <small>(-25.00% to -25.00%)</small></td>') == 1
    assert re.search(r"<td>\+0\.\d+ <small>\(-0\.\d+ to \+0\.\d+\)</small></td>", text)


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
    heads = re.findall(r"<tr><th[^>]*>(?:<[^>]*>)?method(?:<[^>]*>)?</th><th[^>]*>(?:<[^>]*>)?(\w+)<", text)
    assert heads == ["lossless"] * 2
    for result in report["results"]:
        name, told = re.escape(result["name"].replace("&", "&amp;")), "yes" if result["lossless"] else "no"
        rows = re.findall(rf"<th[^>]*>{name}</th><td[^>]*>(\w+)</td>", text)
        assert rows == [told] * len(report["results"]), result["name"]


def test_pictures_have_no_white_on_a_dark_page(tmp_path):
    text = written(tmp_path, json.loads(MEASURED.read_text()))
    dark = text[text.index("@media (prefers-color-scheme: dark)") :].split("\n}")[0]
    assert re.search(r":is\(\.charts, \.legend\) img \{ filter: invert\(1\)[^}]*mix-blend-mode: screen", dark)


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


def test_a_pipe_is_no_report(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    assert cli.main(["report", str(tmp_path / "pipe"), "--out", str(tmp_path / "page.html")]) == 2
    assert "no regular file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{}", "its kind is null; the page takes reports of `specattn eval methods`"),
        ('{"kind": "specattn-bench-kernels"}', 'its kind is "specattn-bench-kernels"; the page takes'),
        ("[]", '`specattn bench engines` ("specattn-bench-engines") and `specattn bench serve` ('),
        ("not JSON", "cannot be shown: Expecting value"),
        ('{"kind": "specattn-bench-engines"}', "is no report of `specattn bench`"),
        ('{"kind": "specattn-eval-methods"}', "is no report of `specattn eval methods`"),
        (Report(provenance={}, setup={}, results=[]).model_dump_json(), "no dense run in it"),
        ("[" * 200_000, "nested too deep"),
        ('{"kind": NaN}', "NaN is no number"),
        (json.dumps(json.loads(MEASURED.read_text()) | {"setup": {}}), "it lacks what such reports have (KeyError: "),
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
    assert charts.family(name) == expected


def test_no_two_series_look_alike():
    looks = [tuple(sorted(charts.look(number).items())) for number in range(len(charts.COLOURS) * len(charts.MARKS))]
    assert len({*looks}) == len(looks) == 56
    # Neighbours share neither.
    for one, other in itertools.pairwise(looks):
        assert not {*one} & {*other}


def contrast(one: str, other: str) -> float:
    """Of two colours, as WCAG defines it."""

    def luminance(colour: str) -> float:
        colour = colour.lstrip("#")
        colour = "".join(2 * digit for digit in colour) if len(colour) == 3 else colour
        parts = [int(colour[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_all_can_be_told_from_what_is_behind_it(tmp_path):
    text = written(tmp_path, json.loads(MEASURED.read_text()))
    schemes = [dict(re.findall(r"--(\w+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", text, re.S)]
    assert len(schemes) == 2, "light and dark"
    for colours in schemes:
        assert set(colours) >= {"back", "text", "dim", "shade", "ours", "stock", "losing"}
        for name in ("text", "dim", "losing"):
            assert all(contrast(colours[name], colours[behind]) >= 4.5 for behind in ("back", "shade")), name
        assert all(contrast(colours[name], colours["back"]) >= 3 for name in ("ours", "stock"))
    assert all(contrast(colour, "#ffffff") >= 4.5 for colour in charts.COLOURS)


@pytest.mark.parametrize("files", [[MEASURED], [SPEED], [MEASURED, SPEED]], ids=["quality", "speed", "both"])
def test_the_page_can_be_read_in_other_ways_too(tmp_path, files):
    text = written(tmp_path, *(json.loads(path.read_text()) for path in files))
    page = Page(text)
    tags = [tag for tag, _ in page.seen]
    assert page.open == [] and dict(page.seen)["html"] == {"lang": "en"}
    assert tags.count("h1") == tags.count("title") == 1 and tags.count("h2") == len(files)
    # No level is left out.
    levels = [int(tag[1]) for tag in tags if re.fullmatch(r"h\d", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all("alt" in given for tag, given in page.seen if tag == "img")
    assert {given.get("scope") for tag, given in page.seen if tag == "th"} == {"col", "row"}
    # Columns are sorted, and what does not fit is moved, with the keyboard as well.
    sortable = re.findall(r'<table class="sortable">\n<thead>(.*?)</thead>', text, re.S)
    assert len(sortable) == len(files)
    assert all(head.count("<th ") == head.count("<button ") > 0 for head in sortable)
    for region in re.findall(r'<div class="scroll"([^>]*)>', text):
        assert 'tabindex="0"' in region and 'role="region"' in region and "aria-label=" in region
    assert "width=device-width" in text and tags.count("table") == text.count('class="scroll"')


def test_lossless_rows_are_shaded_and_no_others(tmp_path):
    report = json.loads(MEASURED.read_text())
    text = written(tmp_path, report)
    assert re.findall(r'<tr class="lossless"><th scope="row">(.*?)</th>', text) == [
        result["name"] for result in report["results"] if result["lossless"]
    ]


def test_speed_has_every_cell_and_says_which_lose(tmp_path):
    given = json.loads(SPEED.read_text())
    text = written(tmp_path, given)
    report = schema.Report.model_validate(given)
    page = Page(text)
    assert "<title>How fast it decodes</title>" in text and "95% intervals" not in text
    rows = speed.entries(report)
    shown = [entry for _, row in rows for entry in row]
    lost = [entry for entry in shown if entry.losing]
    assert lost and all(entry.text in page.cells for entry in shown)
    assert text.count('<td class="losing">') == text.count('<span class="bar losing" style') == len(lost)
    assert "<li>sketch-alone 8%: 16 x 512, 1 x 512, 4 x 4k, 1 x 4k, 1 x 32k</li>" in text
    # A bar for each, the longest of each cell as long as those of the others.
    widths = [float(width) for width in re.findall(r'<span class="bar \w+" style="width: ([\d.]+)%"', text)]
    assert len(widths) == len(shown) and widths.count(max(widths)) == len(rows)
    assert all(remark in html.unescape(text) for remark in speed.remarks(report))


def test_speed_without_what_it_would_be_compared_with_claims_nothing(tmp_path):
    given = json.loads(SPEED.read_text())
    given["engines"] = [engine for engine in given["engines"] if engine["name"].startswith("sketch")]
    text = written(tmp_path, given)
    assert "nothing can be compared" in text and "No cell of ours" not in text and "bar losing" not in text
    assert "</span>this plugin" in text and "</span>stock vLLM" not in text, "the key names what is not there"
    given = json.loads(SPEED.read_text())
    given["engines"][0]["cells"][0] |= {"tokens_per_second": None, "skipped": "needs <more> tokens"}
    assert "not measured: needs &lt;more&gt; tokens" in written(tmp_path, given)
