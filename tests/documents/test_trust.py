"""docs/trust.md: its tables are what docs/results holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/trust.md").read_text()
LOADS = json.loads((ROOT / "docs/results/cpu-load.json").read_text())


@pytest.mark.parametrize("name", LOADS)
def test_the_loads_are_what_was_measured(name):
    of = LOADS[name]
    requests, memory, counters = of["requests"], of["memory"]["all"], of["counters"]
    sparse, dense = (counters[f"specattn:rows_total {kind}"] for kind in ("sparse", "dense"))
    cells = [
        name,
        *(f"{requests[kind]}" for kind in ("answered", "cut", "malformed")),
        f"{of['tokens']:,}",
        f"{sparse / (sparse + dense):.0%}",
        " and ".join(f"{of['latency_s'][of_all]:.0f} s" for of_all in ("p50", "p99")),
        f"{memory['mib_per_minute']:.1f} ± {memory['standard_error']:.1f} MiB",
    ]
    assert f"| {' | '.join(cells)} |" in PAGE
    assert not any(of["checks"].values()) and not requests["wrong"]
    assert not of["exact_beside_others"]["others"] and of["settings"]["minutes"] >= 10


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


def test_the_drift_is_what_was_measured():
    """A row for each setting that went through all of the text, and a sentence for those that began near its end."""
    measured = json.loads((ROOT / "docs/results/cpu-drift.json").read_text())["along held-out text"]
    for name, of in measured.items():
        if "kl_slope_per_1000" in of:
            slope = of["kl_slope_per_1000"]
            quarters = [sum(of["kl"][start : start + 4]) / 4 for start in (0, 4, 8, 12)]
            cells = [
                name,
                f"{of['kv_read']:.1%}",
                *(f"{kl:.4f}" for kl in quarters),
                f"{slope['value']:+.4f} ({slope['interval'][0]:+.4f} to {slope['interval'][1]:+.4f})",
                f"{sum(of['top1']) / 16:.1%}",
            ]
            assert f"| {' | '.join(cells)} |" in PAGE
        elif name.endswith(", fresh"):
            [fresh], last = of["kl"], measured[name.removesuffix(", fresh")]["kl"][-1]
            ratio = name.removesuffix(", fresh").removeprefix("ratio ")
            assert f"with ratio {ratio} {last:.4f} after the long run, and {fresh:.4f} on a fresh cache" in words()


def test_what_dense_steps_buy_is_what_was_measured():
    measured = json.loads((ROOT / "docs/results/cpu-drift.json").read_text())
    without = sum(measured["along held-out text"]["ratio 0.08"]["kl"][:4]) / 4
    every = measured["along its first 1,024 positions"]
    kls = [every[f"ratio 0.08, every {steps}"]["kl_mean"]["value"] for steps in (16, 64)]
    says = f"with ratio 0.08, {without:.4f} without, {kls[0]:.4f} with N = 16, and {kls[1]:.4f} with N = 64"
    assert f"In the first 1,024 positions the KL is, {says}" in words()


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
