"""The page of metrics and the dashboard: the table is the code's, and queries name what there is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from specattn_vllm.metrics.families import FAMILIES

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
PAGE = (ROOT / "docs" / "metrics.md").read_text()
DASHBOARD = json.loads((DOCKER / "grafana/dashboards/specattn.json").read_text())
LABELS = {"le", "instance", *(label for family in FAMILIES for label in family.all_labels)}


def queries_of_the_page() -> list[str]:
    return re.findall(r"```promql\n(.*?)```", PAGE, re.S)


def queries_of_the_dashboard() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def series() -> set[str]:
    """Names as they are scraped."""
    return {
        family.name + suffix
        for family in FAMILIES
        for suffix in (("_bucket", "_sum", "_count") if family.kind == "histogram" else ("",))
    }


def test_the_clock_costs_what_was_measured():
    clock = json.loads((ROOT / "docs/results/h200-tests.json").read_text())["2026-12-01"]["clock"]
    assert f"take {max(clock['us_per_pair']):.1f} µs of the device's time in a CUDA graph" in PAGE
    assert 2 * max(clock["us_per_pair"]) / 20_000 < 0.0002 and "costs less than 0.02% of a round" in PAGE


def test_counting_costs_no_more_than_was_measured():
    engines = json.loads((ROOT / "docs/results/h200-sketch-round.json").read_text())["engines"].values()
    took = [[kernel["ms"] for kernel in of["kernels"].values()] for of in engines]
    model, alone = (sum(ms for ms in of if ms <= 0.02) / sum(of) for of in took)
    assert max(model, alone) < 0.01
    told = f"{model:.1%} of the device's time in a round at 16 x 32k with a draft model, and {alone:.1%} without"
    assert told in PAGE


def test_the_table_is_the_code_s():
    rows = re.findall(r"^\| `(specattn:\w+)` \| (\w+) \| (.*?) \| (.*?) \|$", PAGE, re.M)
    expected = [(f.name, f.kind, ", ".join(f"`{label}`" for label in f.all_labels), f.text) for f in FAMILIES]
    assert rows == expected


def test_each_metric_is_used_by_a_query_of_the_page_and_none_that_is_not_there():
    named = set(re.findall(r"specattn:\w+", "".join(queries_of_the_page())))
    assert named == series()


def test_panels_use_what_there_is():
    named = set(re.findall(r"specattn:\w+", "".join(queries_of_the_dashboard())))
    assert named == series()


@pytest.mark.parametrize("query", queries_of_the_page() + queries_of_the_dashboard())
def test_labels_in_queries_are_those_of_the_metrics(query):
    selected = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", query)
    grouped = re.findall(r"\bby \(([^)]*)\)", query)
    assert {*selected, *(label.strip() for labels in grouped for label in labels.split(","))} <= LABELS
    assert query.count("(") == query.count(")")


def test_reasons_and_kinds_of_the_page_are_the_code_s():
    code = (ROOT / "specattn_vllm/metrics/families.py").read_text()
    for word in ("exact", "small batch", "short context", "no selection", "stale"):
        assert f'"{word}"' in code and f"`{word}`" in PAGE
    for word in ("sparse", "dense", "prefill", "verification", "drafting"):
        assert f'"{word}"' in code and f"`{word}`" in PAGE


def test_the_services_find_their_files_and_each_other():
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    gpu = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text())["services"]
    assert set(gpu) == {"specattn"}
    assert (DOCKER.parent / services["specattn"]["build"]["dockerfile"]).is_file()
    assert (DOCKER.parent / gpu["specattn"]["build"]["dockerfile"]).is_file()
    inside = {}
    for service in ("prometheus", "grafana"):
        for volume in services[service]["volumes"]:
            here, there, _ = volume.split(":")
            assert (DOCKER / here).exists(), here
            inside[there] = DOCKER / here
    scraped = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"]
    assert scraped[0]["static_configs"][0]["targets"] == ["specattn:8000"]
    provisioning = DOCKER / "grafana/provisioning"
    [source] = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    interval = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == interval
    [provider] = yaml.safe_load((provisioning / "dashboards/specattn.yml").read_text())["providers"]
    home = Path(services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == provider["options"]["path"]
    assert (inside[str(home.parent)] / home.name).is_file()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool on PATH: apt-get install prometheus")
def test_prometheus_takes_its_file():
    command = ["promtool", "check", "config", str(DOCKER / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
