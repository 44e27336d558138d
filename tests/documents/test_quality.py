"""Quality in the documents: tables and figures are those of docs/results, and their commands run what is in them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
GONE = ("unread_mean", "layer_map")
"""An option that there was when some reports were made, and one that the command adds."""
REAL = "eval methods --target SmolLM2-135M-Instruct --draft DRAFT"


def methods_in_evaluation(file: str, begins: str, capsys) -> None:
    """The page has a report's table, under the command that makes it."""
    from specattn_vllm.evaluation.report import markdown
    from specattn_vllm.evaluation.results import read

    measured = read(ROOT / f"docs/results/{file}.json")
    document = (ROOT / "docs/evaluation.md").read_text()
    assert markdown(measured) in document
    command_runs(begins, document, measured, capsys)


def rows_of(file: str) -> dict[str, list[str]]:
    """Each setting of a report with the cells of its row."""
    from specattn_vllm.evaluation.report import markdown
    from specattn_vllm.evaluation.results import read

    lines = markdown(read(ROOT / f"docs/results/{file}.json")).splitlines()
    return {cells[0]: cells for cells in (line.strip("| ").split(" | ") for line in lines) if len(cells) > 5}


def test_the_quality_on_a_real_model_is_what_was_measured():
    words, page = " ".join(README.split()), (ROOT / "docs/sketch.md").read_text()
    rows, longer = rows_of("h200-real-methods"), rows_of("h200-real-8k")
    fifth, less, floor = (rows[name] for name in ("sketch 20%", "sketch 15%", "dense, another batch shape"))
    bytes_, kl, same, perplexity = (fifth[i].split()[0] for i in (2, 4, 6, 7))
    rounding = floor[4].split()[0]
    assert f"reading {bytes_} of the KV cache's bytes gives KL {kl} to dense attention ({rounding} of it" in words
    assert f"of it is rounding), {same} top-1 agreement, and perplexity {perplexity}." in words
    bytes_, kl, same, perplexity = (less[i].split()[0] for i in (2, 4, 6, 7))
    assert f"Reading {bytes_} gives KL {kl}, {same} and {perplexity}." in words
    for context, found in (("4,096", rows), ("7,000", longer)):
        for ratio, name in (("0.127", "sketch 20%"), ("0.077", "sketch 15%")):
            row = found[name]
            cells = (context, ratio, row[1], row[2], row[4], *(row[i].split()[0] for i in (5, 6, 7)))
            assert f"| {' | '.join(cells)} |" in page


@pytest.mark.parametrize(
    ("file", "begins"),
    [
        ("h200-real-methods", f"{REAL} --settings docs/settings/real-methods.json"),
        ("h200-real-4k", f"{REAL} --settings docs/settings/real-4k.json"),
        ("h200-real-8k", f"{REAL} --settings docs/settings/real-8k.json"),
        ("cpu-real-maps", f"{REAL} --settings docs/settings/real-maps.json"),
        ("cpu-fp8", f"{REAL} --settings docs/settings/real-fp8.json"),
    ],
)
def test_the_tables_of_methods_are_what_was_measured(file, begins, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    methods_in_evaluation(file, begins, capsys)


def test_what_drafts_read_on_a_real_model_is_what_was_measured():
    """Two rows of the table are of ways to draft that are gone, so no settings make it."""
    from specattn_vllm.evaluation.report import markdown
    from specattn_vllm.evaluation.results import read

    table = markdown(read(ROOT / "docs/results/h200-real-drafting.json"))
    page = (ROOT / "docs/evaluation.md").read_text()
    assert table in page
    rows = {
        cells[0]: cells for cells in (line.strip("| ").split(" | ") for line in table.splitlines()) if len(cells) > 5
    }
    lists, most, least = (rows[f"draft model, {name}"] for name in ("attention 10%", "sketch 30%", "sketch 10%"))
    words = f"at {most[3]} as lists are at {lists[3]}, {most[7].split()[0]} tokens a round, and nearly as often at "
    words += f"{least[3]} ({least[7].split()[0]})"
    assert words in " ".join(page.split())
    own, sketched = rows["vegas, attention 10%"], rows["vegas, sketch 8.25%"]
    words = f"{own[7].split()[0]} of 6 tokens with {own[3]}, than by a sketch at as many bytes, "
    assert words + f"{sketched[7].split()[0]} with {sketched[3]}" in " ".join(page.split())


def test_how_far_off_the_papers_methods_are_alone_is_what_was_measured():
    measured = json.loads((ROOT / "docs/results/cpu-real-maps.json").read_text())["results"]
    kl = {row["name"]: row["figures"]["kl"]["value"] for row in measured if row["figures"]["kl"]}
    times = [f"{kl[f'{name} 20%'] / kl['sketch 20%']:.0f}" for name in ("specattn", "sts")]
    words = " ".join((ROOT / "docs/evaluation.md").read_text().split())
    assert "is {} times that of `sketch`, and that of `sts` {} times.".format(*times) in words
    assert set(json.loads((ROOT / "docs/settings/real-map.json").read_text())["layers"]) == {0}


def test_how_much_further_off_other_choices_are_is_what_was_measured():
    measured = json.loads((ROOT / "docs/results/h200-real-4k.json").read_text())["results"]
    above = {
        row["name"]: row["figures"]["kl_above_rounding"]["value"]
        for row in measured
        if row["figures"]["kl_above_rounding"]
    }

    def times(share: str) -> list[str]:
        names = ("mean and std", "channels", "specattn", "quest")
        return [f"{above[f'{name} {share}'] / above[f'sketch {share}']:.0f}" for name in names]

    words = " ".join((ROOT / "docs/evaluation.md").read_text().split())
    found = {name: row[5].split()[0] for name, row in rows_of("h200-real-methods").items()}
    own = found["sketch 20%"], found["sketch 15%"]
    assert "is {} above the floor with a fifth of the bytes and {} with".format(*own) in words
    measured = json.loads((ROOT / "docs/results/h200-real-methods.json").read_text())["results"]
    off = {
        row["name"]: row["figures"]["kl_above_rounding"]["value"]
        for row in measured
        if row["figures"]["kl_above_rounding"]
    }
    papers = [f"{off[f'{m} {s}'] / off[f'sketch {s}']:.0f}" for m in ("specattn", "sts") for s in ("20%", "15%")]
    assert "`specattn` is {} and {} times as far off, `sts` {} and {} times.".format(*papers) in words
    better = [f"{off[f'{m} 20%, map by retained attention'] / off['sketch 20%']:.0f}" for m in ("specattn", "sts")]
    assert "brings `specattn` to {} times at a fifth, and `sts` to {} times.".format(*better) in words
    assert f"{min(map(int, times('15%')))} to {max(map(int, papers))} times as far off" in " ".join(README.split())
    most = "pages {} times, channels {}, `specattn` {}, Quest {} at a fifth. At 15% it is {}, {}, {} and {} times."
    assert most.format(*times("20%"), *times("15%")) in words


def command_runs(begins: str, document: str, measured, capsys) -> None:
    """The command above a table runs what is in it, as the settings are now."""
    from specattn_vllm import cli
    from specattn_vllm.evaluation.settings import read_settings

    [command] = re.findall(rf"^    specattn ({begins} .*?)\n\n", document, re.M | re.S)
    assert cli.main([*shlex.split(command.replace("\\\n", " ")), "--list"]) == 0
    assert sorted(re.findall(r"^(\S.*)\n  \{", capsys.readouterr().out, re.M)) == sorted(
        r.name for r in measured.results
    )

    def told(options: dict, baseline: dict | None) -> tuple[dict, dict]:
        baseline = {key: value for key, value in (baseline or {}).items() if key not in ("top_p", "shared", "spread")}
        return {key: value for key, value in options.items() if key not in GONE}, baseline

    settings = read_settings(ROOT / re.search(r"--settings (\S+)", command)[1])
    now = {s.name: told(s.options, None if s.baseline is None else s.baseline.model_dump()) for s in settings}
    assert now == {result.name: told(result.options, result.baseline) for result in measured.results}


def test_what_the_script_s_draft_agrees_on_is_what_was_measured():
    measured = json.loads((ROOT / "docs/results/h200-distil.json").read_text())
    words, found = " ".join((ROOT / "docs/real-model.md").read_text().split()), measured["evaluation"]
    told = [f"{found[kind]['agreement']:.0%} of {kind}" for kind in ("prose", "code", "chat")]
    assert f"{measured['training']['steps']:,} steps, and then agrees with the target on {told[0]}, {told[1]}" in words
    assert f"{told[1]} and {told[2]}" in words


def test_what_an_fp8_cache_costs_is_what_was_measured():
    rows, words = rows_of("cpu-fp8"), " ".join((ROOT / "docs/evaluation.md").read_text().split())
    eight, alone, both = (rows[name] for name in ("dense, fp8 cache", "sketch 12.5%", "sketch 12.5%, fp8 cache"))
    kl = [row[4].split()[0] for row in (eight, alone, both)]
    told = f"KL {kl[0]} with all of an fp8 cache, {kl[1]} with `sketch` and a cache as the model computes, {kl[2]} with"
    assert told in words
    assert f"{both[2]} of the bytes are read with {both[1]} of the entries, and not {alone[2]}" in words
    changes = " ".join((ROOT / "CHANGELOG.md").read_text().split())
    assert f"the rounding alone costs KL {kl[0]}, `sketch` alone {kl[1]}, and both {kl[2]}" in changes
