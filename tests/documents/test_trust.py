"""docs/trust.md: its tables are what docs/results holds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from specattn_vllm.methods import METHODS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/trust.md").read_text()
LOADS = {
    name: of
    for on in ("cpu", "h200")
    for name, of in json.loads((ROOT / f"docs/results/{on}-load.json").read_text()).items()
}


@pytest.mark.parametrize("name", LOADS)
def test_the_loads_are_what_was_measured(name):
    of = LOADS[name]
    requests, memory, counters = of["requests"], of["memory"]["all"], of["counters"]
    sparse, dense = (counters[f"specattn:rows_total {kind}"] for kind in ("sparse", "dense"))
    cells = [
        name,
        *(f"{requests[kind]:,}" for kind in ("answered", "cut", "malformed")),
        f"{of['tokens']:,}",
        f"{sparse / (sparse + dense):.0%}",
        " and ".join(f"{of['latency_s'][of_all]:.0f} s" for of_all in ("p50", "p99")),
        f"{memory['mib_per_minute']:.1f} ± {memory['standard_error']:.1f} MiB",
    ]
    assert f"| {' | '.join(cells)} |" in PAGE
    assert not any(of["checks"].values()) and not requests["wrong"]
    if "shape" in of["settings"]:  # random weights: of their tokens nothing is asked
        assert of["settings"]["requests"] == sum(requests[kind] for kind in ("answered", "cut", "malformed")) == 2000
        told = f"up to {max(s['num_requests_running'] for s in of['samples']):.0f} requests ran at a time, "
        told += f"up to {max(s['kv_cache_usage_perc'] for s in of['samples']):.0%} of the pages were in use, "
        assert f"{told}and requests were preempted {of['preemptions']:.0f} times" in words()
    else:
        assert not of["exact_beside_others"]["others"] and of["settings"]["minutes"] >= 10


def test_memory_is_what_was_measured():
    runs = json.loads((ROOT / "docs/results/cpu-memory.json").read_text())["servers"]["runs"]
    told = [runs[name]["worker_allocated_mib"] for name in ("vLLM's own attention", "dense", "sketch, 20 minutes")]
    most = [f"{of['most']:,.0f} MiB with" for of in told]
    assert all(words().count(one) >= most.count(one) for one in most)
    slopes = [of["last_three_minutes"] for of in told]
    own, dense, sketch = (f"{of['mib_per_minute']:.1f} ± {of['standard_error']:.1f}" for of in slopes)
    assert f"it was {own}, {dense} and {sketch} MiB a minute" in words()
    assert all(abs(of["mib_per_minute"]) < 2 * of["standard_error"] for of in slopes), "no growth to be seen"


def test_the_requests_of_schemathesis_are_those_that_were_made():
    found = json.loads((ROOT / "docs/results/cpu-schemathesis.json").read_text())
    assert f"| {found['cases']} requests for completions and chats: none" in PAGE
    assert not found["failures"] and not found["errors"]


def test_the_long_run_is_the_one_that_was_made():
    found = json.loads((ROOT / "docs/results/long.json").read_text())
    assert not found["failures"] and set(found["steps_by_method"]) == set(METHODS)
    fewest = min(found["steps_by_method"].values())
    assert fewest >= 10_000
    assert f"{found['steps']:,} steps of random schedules, at least {fewest:,} for each method" in words()
    assert f"{found['faults_injected']:,} faults injected" in words()
    schedules = found["schedules"].values()
    preempted = sum(of.get("preempted", 0) for of in schedules)
    aborted = sum(count for of in schedules for what, count in of.items() if what.startswith("aborted"))
    codes = sum(of.get("codes", 0) for of in schedules)
    assert f"{preempted:,} preemptions and {aborted:,} aborts; {codes:,} codes of keys computed again" in words()


def test_the_long_run_a_step_ahead_is_the_one_that_was_made():
    found = json.loads((ROOT / "docs/results/long-ahead.json").read_text())
    assert not found["failures"] and all(name.endswith("planned ahead") for name in found["schedules"])
    assert all(of["tokens that the scheduler does not know yet"] > 1000 for of in found["schedules"].values())
    assert f"{found['steps']:,} more steps" in words()


def test_the_long_run_of_other_drafters_is_the_one_that_was_made():
    found = json.loads((ROOT / "docs/results/long-drafters.json").read_text())
    assert not found["failures"] and f"{found['steps']:,} steps of `sketch` beside" in words()
    assert [name.removeprefix("sketch with ") for name in found["schedules"]] == [
        "EAGLE-3", "DFlash", "DSpark", "MTP", "modules of MTP",
    ]  # fmt: skip


def test_the_memory_of_one_process_is_what_was_measured():
    samples = json.loads((ROOT / "docs/results/cpu-memory.json").read_text())["samples"]
    half, end = (sample for sample in samples if sample["requests"] in (512, 1024))
    says = f"{half['allocated_mib']:,.0f} MiB were allocated after 512 requests of such a load and"
    assert f"{says} {end['allocated_mib']:,.0f} MiB after 1,024" in words()


def test_the_audits_are_what_was_measured():
    audit = json.loads((ROOT / "docs/results/cpu-audit.json").read_text())
    assert f"The mean loss of all {audit['pairs']:,} pairs is {audit['mean_loss']:.1%}" in words()
    for share, of in audit["shares"].items():
        window = of["error_of_a_window"]
        cells = [
            share,
            f"{of['pairs'] / audit['windows']:.0f}",
            f"{of['error_of_the_whole']:+.1%}",
            *(f"{window[what]:.1%}" for what in ("deviation", "most")),
            f"{of['windows_within_a_tenth']:.0%}",
        ]
        assert f"| {' | '.join(cells)} |" in PAGE


DRIFT = json.loads((ROOT / "docs/results/h200-drift.json").read_text())
TEXTS = {"along held-out text": "held-out"} | {
    f"along its own text, ratio {ratio}": "its own" for ratio in (0.08, 0.125)
}


@pytest.mark.parametrize("along", TEXTS)
def test_the_drift_is_what_was_measured(along):
    """A row for each setting that went through all of the text, and figures of those that began near its end."""
    for name, of in DRIFT[along].items():
        ratio = name.removeprefix("ratio ").removesuffix(", fresh")
        if "kl_slope_per_1000" in of:
            slope = of["kl_slope_per_1000"]
            cells = [
                ratio,
                TEXTS[along],
                f"{of['kv_read']:.1%}",
                *(f"{sum(of['kl'][start : start + 4]) / 4:.4f}" for start in (0, 4, 8, 12)),
                f"{slope['value']:+.4f} ({slope['interval'][0]:+.4f} to {slope['interval'][1]:+.4f})",
                f"{sum(of['top1']) / 16:.1%}",
            ]
            assert f"| {' | '.join(cells)} |" in PAGE
            assert slope["interval"][1] < 0, "the page says that it falls"
        elif name.endswith(", fresh"):
            long = DRIFT[along][name.removesuffix(", fresh")]
            assert re.search(
                rf"with ratio {ratio}, {long['kl'][-1]:.4f}( after the long run)? and {of['kl'][0]:.4f}", words()
            )
            assert 1 / 8 < 1 - of["kl"][0] / long["kl"][-1] < 3 / 8
            ends = zip(long["kl_by_document"], of["kl_by_document"], strict=True)
            assert all(whole[-1] > fresh[0] for whole, fresh in ends)


def test_what_dense_steps_buy_is_what_was_measured():
    of = DRIFT["along held-out text"]
    kl = {name: found["kl_mean"]["value"] for name, found in of.items() if "kl_mean" in found}
    read = {name: found["kv_read"] for name, found in of.items() if "kv_read" in found}
    costs = read["ratio 0.08, every 16"] - read["ratio 0.08"]
    falls = 1 - kl["ratio 0.08, every 16"] / kl["ratio 0.08"]
    assert f"costs {costs:.1%} of the KV cache, and the KL falls by {falls:.0%}" in words()
    assert read["ratio 0.125"] < read["ratio 0.08, every 16"]
    assert f"less is read and the KL falls by {1 - kl['ratio 0.125'] / kl['ratio 0.08']:.0%}" in words()


def words() -> str:
    return " ".join(PAGE.split())


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def test_the_tables_of_the_guarantee_are_what_was_measured():
    page = (ROOT / "docs" / "sketch.md").read_text()
    found = json.loads((ROOT / "docs/results/cpu-guarantee.json").read_text())
    assert f"{found['selections']:,} selections, with {found['rows']:,} query rows" in " ".join(page.split())
    ways = {way: told["delta 0.05"] for way, told in found["ways"].items()}
    names = ("rows_that_lose_more", "of_them_unnoticed", "heads_that_fall", "of_them_needlessly", "entries_read")
    for epsilon in ("0.3", "0.2", "0.1", "0.05"):
        cells = [ways["64 draws"][f"epsilon {epsilon}"][name] for name in names]
        cells = [
            f"{100 * cell:.0f}%" if name == "of_them_needlessly" else percent(cell)
            for name, cell in zip(names, cells, strict=True)
        ]
        assert f"| {epsilon} | {' | '.join(cells)} |" in page
    uniform = ways["64 draws, uniform"]["epsilon 0.2"]
    assert (
        f"it is {uniform['of_them_needlessly']:.0%}, and {percent(uniform['heads_that_fall'])} of the heads fall"
        in page
    )
    assert f"the truth in {ways['64 draws']['bound_below_truth']:.0%} of them" in " ".join(page.split())
    rounds = json.loads((ROOT / "docs/results/cpu-guarantee-rounds.json").read_text())
    rows = {"12.5%": "", "12.5%, epsilon 0.3": ", `epsilon` 0.3", "12.5%, epsilon 0.2": ", `epsilon` 0.2", "19%": ""}
    for result in rounds["results"][1:]:
        figures, counts, name = result["figures"], result["forced"], result["name"]
        fell = percent(counts["heads_fallen"] / counts["heads_checked"]) if counts["heads_checked"] else ""
        ends = " to ".join(f"{end:.4f}" for end in figures["kl"]["interval"])
        cells = [fell, percent(figures["kv_read"]), percent(figures["bytes_read"])]
        cells += [f"{figures['kl']['value']:.4f} ({ends})", percent(figures["agreement"]["value"])]
        row = f"| `ratio` {result['options'].get('ratio', 0.125)}{rows[name]} | {' | '.join(cells)} |".replace(
            "|  |", "| |"
        )
        assert row in page, row


def test_the_mutations_are_as_many_as_were_noticed():
    found = json.loads((ROOT / "docs/results/mutations.json").read_text())["mutations"]
    assert f"the tests notice each of {len(found)} |" in PAGE
