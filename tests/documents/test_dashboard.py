"""The dashboard as an operator sees it, without a Grafana: what each panel says, its unit, its colours and its place.

tests/engine/test_newcomer.py runs the queries; test_metrics.py knows which metrics there are.
"""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "docker/grafana/dashboards/specattn.json").read_text())
PANELS = DASHBOARD["panels"]
[TABLE, *CHARTS] = PANELS
VALUES = {
    "by": ("verification", "drafting"),
    "kind": ("sparse", "dense", "prefill"),
    "reason": ("exact", "small batch", "short context", "no selection", "stale"),
}
"""Of labels that tell series apart."""
SHORT = 26
"""Letters of a title that fit where three panels lie beside each other on a screen of 800 pixels."""

each_panel = pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
each_chart = pytest.mark.parametrize("panel", CHARTS, ids=lambda panel: panel["title"])


def names(panel: dict) -> list[str]:
    """What the legend may say."""
    found = []
    for target in panel["targets"]:
        label = re.search(r"\{\{(\w+)\}\}", target["legendFormat"])
        values = VALUES[label[1]] if label else ("",)
        found += [target["legendFormat"].replace(label[0] if label else "{{}}", value) for value in values]
    return found


def settings(panel: dict, name: str) -> dict:
    """What overrides set for a series; the last one that matches counts."""
    found = {}
    for rule in panel["fieldConfig"]["overrides"]:
        kind, given = rule["matcher"]["id"], rule["matcher"]["options"]
        matches = {
            "byName": lambda given: name == given,
            "byRegexp": lambda given: re.search(given.strip("/"), name),
            "byType": lambda given: given == "number",
        }
        if matches[kind](given):
            found |= {one["id"]: one["value"] for one in rule["properties"]}
    return found


def unit(query: str) -> str:
    """Grafana's, of what a query gives: a share, seconds, bytes or others each second, or a number."""
    if "_seconds_bucket" in query:
        return "s"
    if "rounds_total" in query and "/" in query:
        return "short"
    if "selection_seconds" in query:
        return "percentunit"  # seconds in each second
    if "/" in query or re.search(r"retained_mass|usage_perc", query):
        return "percentunit"
    if "rate(" in query:
        return "Bps" if "bytes" in query else "suffix:/s"
    return "short"


def test_the_table_is_first_and_the_rest_are_charts():
    assert TABLE["type"] == "table" and {panel["type"] for panel in CHARTS} == {"timeseries"}


def test_panels_lie_beside_each_other():
    """In Grafana's grid of 24 columns."""
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        at = panel["gridPos"]
        assert at["x"] >= 0 and at["x"] + at["w"] <= 24, panel["title"]
        cells = set(itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])))
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len(taken) == 24 * (1 + max(y for _, y in taken)), "a gap"
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    # On a phone they lie below each other, in the order of the file.
    places = [(panel["gridPos"]["y"], panel["gridPos"]["x"]) for panel in PANELS]
    assert places == sorted(places)


@each_panel
def test_each_panel_says_what_it_shows_of_the_servers_that_are_chosen(panel):
    assert panel["title"] and len(panel["title"]) <= SHORT
    assert panel["datasource"] == {"type": "prometheus", "uid": "${source}"}
    for target in panel["targets"]:
        query = target["expr"]
        # Each series is one of the chosen servers', and no name of a server is written down.
        assert len(re.findall(r"(?:specattn|vllm):\w+", query)) == query.count('{instance=~"$instance"')
        assert not re.search(r"\[\d", query), "a window that does not go with the time that is shown"


@each_panel
def test_each_panel_says_what_is_normal_and_why_it_may_be_empty(panel):
    assert re.search(r"[.:] Normal: \w", panel["description"]) and panel["description"].endswith(".")
    empty = panel["fieldConfig"]["defaults"]["noValue"]
    assert empty.startswith("No") and empty.endswith(".")


@each_chart
def test_a_series_without_values_is_not_explained_as_a_panel_without_series(panel):
    """Grafana shows `noValue` of a panel in the legend too, behind a series that has no value."""
    assert all(settings(panel, name)["noValue"] == "-" for name in names(panel))


@each_chart
def test_units_are_those_of_the_queries(panel):
    defaults = panel["fieldConfig"]["defaults"]
    assert {unit(target["expr"]) for target in panel["targets"]} == {defaults["unit"]}
    assert defaults["min"] == 0
    if defaults["unit"] == "percentunit":
        # Else an axis ends where the data does, and a small share looks like a large one.
        assert defaults.get("max", defaults["custom"].get("axisSoftMax")) == 1


@each_chart
def test_series_are_told_apart(panel):
    shown = names(panel)
    assert len({*shown}) == len(shown) and all(shown)
    looks = [
        (settings(panel, name)["color"]["fixedColor"], "custom.lineStyle" in settings(panel, name)) for name in shown
    ]
    assert len({*looks}) == len(shown), looks
    # The same thing has the same colour on every panel, whatever else is shown.
    for name, (colour, _) in zip(shown, looks, strict=True):
        for who, its in {"verification": "blue", "drafting": "purple"}.items():
            assert not name.endswith(who) or colour == its


@each_chart
def test_the_legend_fits(panel):
    """On a phone it has three lines of 47 letters; what is in the fourth nobody sees."""
    legend = panel["options"]["legend"]
    lines = [0]
    for name in names(panel):
        letters = len(f"__ {name}") + sum(len(f" {calc}: 88.8%") for calc in legend["calcs"])
        if lines[-1] + letters > 47:
            lines.append(0)
        lines[-1] += letters
    assert legend["showLegend"] and len(lines) <= 3, lines


def test_a_line_is_drawn_where_a_description_names_one():
    for panel in CHARTS:
        drawn = panel["fieldConfig"]["defaults"]["custom"].get("thresholdsStyle", {}).get("mode") == "line"
        steps = panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", [])
        assert (
            drawn
            == ("the red line" in panel["description"])
            == any(step == {"color": "red", "value": 1} for step in steps)
        )


def test_columns_of_the_table_are_labels():
    [organize] = TABLE["transformations"]
    order, named = organize["options"]["indexByName"], organize["options"]["renameByName"]
    assert list(order) == sorted(order, key=order.get) == list(named)
    assert set(named) == {
        "instance",
        "engine",
        "method",
        "lossless",
        "budget",
        "executor",
        "version",
        "vllm",
        "model_name",
    }
    assert {rule["matcher"]["options"] for rule in TABLE["fieldConfig"]["overrides"]} <= {*named.values()}
    [mapping] = settings(TABLE, named["lossless"])["mappings"]
    assert {value: shown["text"] for value, shown in mapping["options"].items()} == {
        "true": "lossless",
        "false": "approximate",
    }


def test_variables_of_the_dashboard_are_there():
    named = set(re.findall(r"\$\{?(\w+)", json.dumps(PANELS))) - {"__rate_interval"}
    assert named == {"source", "instance"} == {variable["name"] for variable in DASHBOARD["templating"]["list"]}


def test_it_is_of_the_grafana_that_is_started_and_links_to_the_page():
    image = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]["grafana"]["image"]
    assert image.startswith("grafana/grafana:12.1.") and DASHBOARD["schemaVersion"] == 41, "12.1 writes 41"
    source = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Source"]
    for link in DASHBOARD["links"]:
        base, path = link["url"].split("/blob/main/")
        assert base == source and (ROOT / path).is_file()
