"""A newcomer's path: README's commands, the request that the server prints, and what a dashboard then shows.

Prometheus scrapes the server as docker/prometheus.yml says, and is asked what Grafana would ask it for the panels.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlencode

import pytest
import yaml

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
for name in ("prometheus", "curl"):
    missing = f"there is no {name} on PATH: apt-get install {name}"
    pytestmark.append(pytest.mark.skipif(shutil.which(name) is None, reason=missing))

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "docker/grafana/dashboards/specattn.json").read_text())
PAGE = (ROOT / "docs/metrics.md").read_text()
SCRAPE_SECONDS = 1
RATE_INTERVAL = f"{4 * SCRAPE_SECONDS}s"
"""What Grafana puts for $__rate_interval where a pixel is no longer than that."""

WITHOUT_MORE = {
    "Retained mass (audits)": "audit_share is 0 unless it is set, and then nothing is audited",
    "Guarantee held": "nothing is checked unless epsilon is set",
}
MORE = ("--additional-config.specattn.audit_share", "1", "--additional-config.specattn.epsilon", "0.3")
"""Panels that show nothing of the server that README's command starts, and why."""


def commands_of_the_readme() -> tuple[list[str], list[str]]:
    """What starts a server, and the same with the port 9000."""
    section = (ROOT / "README.md").read_text().split("\n## Try it\n")[1].split("\n## ")[0]
    bare = re.findall(r"```bash\n(.*?)\n```", section, re.S)[0]
    with_port = re.search(rf"`({re.escape(bare)} --port 9000)`", section)[1]
    return shlex.split(bare), shlex.split(with_port)


def printed_request(text: str) -> str:
    """The command that the server tells its user to run in another terminal."""
    return re.search(r"in another terminal:\n\n(.*?)\n\n\+ ", text, re.S)[1]


class Prometheus:
    def __init__(self, server_class, folder: Path, target: str) -> None:
        config = yaml.safe_load((ROOT / "docker/prometheus.yml").read_text())
        config["global"]["scrape_interval"] = f"{SCRAPE_SECONDS}s"
        [job] = config["scrape_configs"]
        job["static_configs"] = [{"targets": [target]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))

        def command(port: int) -> list[str]:
            return [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'storage'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ]

        self.server = server_class(folder / "prometheus.log", command, ready="/-/ready")

    def ask(self, what: str, **arguments):
        answer = json.loads(self.server.ask(f"/api/v1/{what}?{urlencode(arguments)}"))
        assert answer["status"] == "success", answer
        return answer["data"]

    def now(self, query: str) -> dict[tuple, list[float]]:
        return _series(self.ask("query", query=query)["result"])

    def since(self, start: float, query: str) -> dict[tuple, list[float]]:
        """Series by their labels, as a panel draws them from then on."""
        asked = {"query": query, "start": start, "end": time.time(), "step": SCRAPE_SECONDS}
        return _series(self.ask("query_range", **asked)["result"])


def _series(result: list[dict]) -> dict[tuple, list[float]]:
    """Points that are numbers: a share of nothing is none."""
    points = {
        tuple(sorted(of["metric"].items())): [float(at) for _, at in of.get("values", [of.get("value")])]
        for of in result
    }
    return {labels: [at for at in values if not math.isnan(at)] for labels, values in points.items()}


def check(query: str, series: dict[tuple, list[float]]) -> None:
    """Each series has numbers, and they can be true."""
    assert series, f"no data: {query}"
    low, high = 0, math.inf
    if query.startswith("specattn:info"):
        low = high = 1
    elif "rounds_total" in query and "/" in query:
        low, high = 1, 5  # tokens a round, of which 4 are drafted
    elif "/" in query or re.search(r"retained_mass|usage_perc", query):
        high = 1
    for labels, values in series.items():
        assert values, f"no numbers of {labels}: {query}"
        assert low <= min(values) and max(values) <= high, (query, labels, min(values), max(values))
    if re.search(r"kv_(bytes|entries)_\w+ */|kv_(bytes|entries)_read_total.*/", query):
        assert all(0 < min(values) < 1 for values in series.values()), (query, series)


@pytest.fixture(params=[(), MORE], ids=["as in README", "with audits and a guarantee"])
def monitored(request, server_class, tmp_path):
    """A server as README starts it, what was added to its command, and its Prometheus."""
    bare, with_port = commands_of_the_readme()
    assert with_port == [*bare, "--port", "9000"]
    added = list(request.param)

    def command(port: int) -> list[str]:
        return [str(ROOT / bare[0]), *bare[1:], "--port", str(port), *added]

    # The environment that runs this test, which `scripts/test` made, is the one to serve from.
    with server_class(tmp_path / "log", command, SPECATTN_VENV=sys.prefix) as server:
        server.wait_until_ready()
        prometheus = Prometheus(server_class, tmp_path, f"127.0.0.1:{server.port}")
        with prometheus.server:
            prometheus.server.wait_until_ready(60)
            yield server, added, prometheus


def test_from_readme_to_the_dashboard(monitored, prompts):
    server, more, prometheus = monitored

    shell = ["bash", "-c", printed_request(server.text())]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert len(answer["choices"][0]["text"].strip()) > 64 and answer["usage"]["completion_tokens"] == 64

    def traffic(*lengths: int) -> None:
        asked = {"model": "demo", "max_tokens": 48, "temperature": 0, "ignore_eos": True}
        for prompt in prompts(lengths):
            for exact in ({}, {"vllm_xargs": {"specattn": "exact"}}):
                body = asked | exact | {"prompt": prompt["prompt_token_ids"]}
                server.ask("/v1/completions", json.dumps(body).encode())
        time.sleep(2 + 2 * SCRAPE_SECONDS)  # metrics are up to two seconds late

    # Prometheus extrapolates young counters, each by itself: their shares are not right yet.
    traffic(3500)
    start = time.time()
    traffic(1500, 2500)

    # What fills the variable `instance`.
    assert prometheus.ask("label/instance/values", **{"match[]": "specattn:info"}) == [f"127.0.0.1:{server.port}"]

    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            query = target["expr"].replace("$instance", ".*").replace("$__rate_interval", RATE_INTERVAL)
            series = prometheus.now(query) if target.get("instant") else prometheus.since(start, query)
            if panel["title"] in WITHOUT_MORE and not more:
                assert not series, panel["title"]
                continue
            check(query, series)
            labels = re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
            assert all(name in dict(of) for name in labels for of in series), (query, list(series))
            assert labels or len(series) == 1, f"the legend does not tell them apart: {query}, {list(series)}"

    queries = [line for block in re.findall(r"```promql\n(.*?)```", PAGE, re.S) for line in re.split(r"\n(?! )", block)]
    for query in filter(None, queries):
        if ("audit" in query or "guarantee" in query) and not more:
            assert not prometheus.now(query), query
        else:
            check(query, prometheus.now(query))
