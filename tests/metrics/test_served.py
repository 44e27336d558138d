"""A server's `/metrics`, as an operator reads them: the numbers of the workers, under the names of the dashboard."""

from __future__ import annotations

import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from specattn_vllm.installed import demo_folder
from specattn_vllm.metrics.families import FAMILIES
from specattn_vllm.stats import Counts

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
LENGTHS = (900, 700)


def options(**given) -> tuple[str, str]:
    return "--additional-config", json.dumps({"specattn": given})


def drafting() -> tuple[str, ...]:
    return "--speculative-model", str(demo_folder("draft")), "--num-speculative-tokens", "4"


def of(counts: list[Counts]) -> dict[tuple, float]:
    """What the metrics are to say of the workers' counts, by rank."""
    first = counts[0]
    expected = {
        ("specattn:rounds_total",): first.rounds,
        ("specattn:sampled_tokens_total",): first.sampled_tokens,
        ("specattn:rows_total", "sparse"): first.sparse_rows,
        ("specattn:rows_total", "dense"): first.verify_rows - first.sparse_rows,
        ("specattn:rows_total", "prefill"): first.prefill_rows,
        ("specattn:dense_rows_total", "exact"): first.exact_rows,
        ("specattn:dense_rows_total", "small batch"): first.small_batch_rows,
    }
    for rank, one in enumerate(counts):
        expected |= {
            ("specattn:kv_entries_read_total", "verification", str(rank)): one.kv_read,
            ("specattn:kv_entries_present_total", "verification", str(rank)): one.kv_full,
        }
    return expected


def named_in_queries() -> set[str]:
    """Names of series in the queries of the page and of the dashboard, vLLM's own too."""
    dashboard = json.loads((ROOT / "docker/grafana/dashboards/specattn.json").read_text())
    text = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    text += " ".join(re.findall(r"```promql\n(.*?)```", (ROOT / "docs/metrics.md").read_text(), re.S))
    return set(re.findall(r"(?:specattn|vllm):\w+", text))


def test_metrics_say_what_workers_count(server):
    """With a sketch: all but audits."""
    one = server(*drafting(), *options(method="sketch", ratio=0.2, min_tokens=32, crossover_tokens=800, epsilon=0.3))
    blank = one.metrics()
    assert blank["specattn:rounds_total",] == 0
    [info] = [key for key in blank if key[0] == "specattn:info"]
    budget, _executor, *rest = info[1:6]
    assert (budget, *rest) == ("ratio=0.2", "false", "sketch", "demo")
    begun = time.monotonic()
    one.complete(900)
    one.complete(900, vllm_xargs={"specattn": "exact"})
    one.complete(300)
    counts = one.counts()
    assert counts[0].exact_rows and counts[0].small_batch_rows and counts[0].sparse_rows
    seen = one.metrics_once(of(counts))
    first = counts[0]
    assert seen["specattn:dense_rows_total", "short context"] == 0
    held = seen["specattn:guarantee_selections_total", "0", "held"]
    fallen = seen["specattn:guarantee_selections_total", "0", "read everything"]
    assert (held + fallen, fallen) == (first.heads_checked, first.heads_fallen) and held
    for by, prefix in (("verification", ""), ("drafting", "draft_")):
        kv = {what: getattr(first, f"{prefix}kv_{what}") for what in ("read", "full", "scanned", "sampled")}
        assert kv["read"] and seen["specattn:kv_entries_read_total", by, "0"] == kv["read"]
        assert seen["specattn:kv_entries_searched_total", by, "0"] == kv["scanned"]
        taken = seen["specattn:selection_seconds_total", by, "0"]
        assert taken == getattr(first, f"{prefix}selection_ns") / 1e9 and 0 < taken < time.monotonic() - begun
        # Heads of 64 in float32, with 2 bits.
        assert seen["specattn:kv_bytes_present_total", by, "0"] == kv["full"] * 512
        assert seen["specattn:kv_bytes_read_total", by, "0"] == kv["read"] * 512 + (kv["scanned"] + kv["sampled"]) * 18
    names = {key[0] for key in seen}
    missing = {name for name in named_in_queries() - names if "audit" not in name}
    assert not missing
    assert "vllm:generation_tokens_total" in names
    # Later requests follow, and the folder goes with the server.
    one.complete(900)
    one.metrics_once(of(one.counts()))
    assert [p for p in one.temporary.glob("specattn-metrics-*") if p.is_dir()]
    one.server.stop()
    assert not list(one.temporary.glob("specattn-metrics-*"))


def test_each_of_several_servers_has_the_same_metrics(server):
    """A choosing draft with audits, so all that the other has not."""
    one = server(
        *drafting(), *options(method="specattn", ratio=0.2, min_tokens=32, audit_share=1.0), "--api-server-count", "2"
    )
    for length in (900, 300):
        one.complete(length)
    one.complete(900, vllm_xargs={"specattn": "exact"})
    [counts] = json.loads(one.ask("/collective_rpc", method="specattn_stats"))["results"]
    counts = Counts(**counts)
    expected = of([counts]) | {
        ("specattn:dense_rows_total", "no selection"): counts.unselected_rows,
        ("specattn:dense_rows_total", "stale"): counts.stale_rows,
    }
    assert counts.exact_rows and counts.audited_pairs
    # Whichever of the two answers.
    for _ in range(8):
        seen = one.metrics_once(expected)
        assert seen["vllm:generation_tokens_total", "demo"] == 3 * 24
    audited = [seen[f"specattn:audit_retained_mass_{what}", "0"] for what in ("count", "sum")]
    assert audited[0] % counts.audited_pairs == 0 and 0 < audited[1] < audited[0]
    assert seen["specattn:selection_seconds_total", "verification", "0"] > 0
    unsought = {"specattn:kv_entries_searched_total", "specattn:guarantee_selections_total"}
    assert named_in_queries() - {key[0] for key in seen} <= unsought
    assert {family.name for family in FAMILIES if family.kind == "counter"} - {key[0] for key in seen} == unsought


@pytest.mark.long
def test_data_parallel_engines_each_count_their_own(server):
    """Whichever engine answers, the tokens are the same."""
    one = server(
        *drafting(),
        *options(method="sketch", ratio=0.2, min_tokens=32, crossover_tokens=0),
        "--data-parallel-size",
        "2",
    )
    given = {"model": "demo", "prompt": list(range(5, 905)), "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: json.loads(one.ask("/v1/completions", **given)), range(6)))
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1
    deadline, rounds = time.monotonic() + 15, {}
    while sum(rounds.values()) < 6 * 5 or len(rounds) < 2:  # at most 5 tokens a round, of 24
        assert time.monotonic() < deadline, rounds
        found = re.findall(r'^specattn:rounds_total{engine="(\d)"} (\S+)$', one.ask("/metrics"), re.M)
        rounds = {engine: float(count) for engine, count in found}
        time.sleep(0.2)
    assert all(rounds.values()), rounds


@pytest.mark.long
def test_two_nodes(server):
    """Two groups of workers on one machine, as `--nnodes` has them on two: the second group is without a server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = ("--tensor-parallel-size", "2", "--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(port))
    chosen = options(method="sketch", ratio=0.2, min_tokens=32, crossover_tokens=0)
    one = server(*drafting(), *chosen, *nodes, others=("--node-rank", "1", "--headless"))
    one.complete(900)
    first, second = one.counts()
    assert first.sparse_rows > 4 and 0 < first.kv_read < first.kv_full
    assert (first.rounds, first.kv_full) == (second.rounds, second.kv_full)
    assert second.kv_read == pytest.approx(first.kv_read, rel=0.1), "each reads what its own heads choose"
    # What another machine counts is not seen here.
    seen = one.metrics_once(of([first]))
    assert ("specattn:kv_entries_read_total", "verification", "1") not in seen


def test_without_vllm_s_metrics_there_are_none_of_ours(server):
    one = server(*options(method="dense"), "--disable-log-stats")
    one.complete(100)
    assert not [key for key in one.metrics() if key[0].startswith("specattn:")]
    assert not list(one.temporary.glob("specattn-metrics-*"))
