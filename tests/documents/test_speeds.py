"""Speeds in the documents: tables and figures are those of docs/results, and their commands run what is in them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "docs/benchmarks.md").read_text()


TABLES = [
    ("h200-sketch-engine", BENCHMARKS, r"^specattn (bench engines .*?)\nspec"),
    ("h200-sketch-default", BENCHMARKS, r"^    specattn (bench engines --grid \S* --modes plain,sketch,vegas .*?)\n\n"),
    ("h200-sketch-alone", BENCHMARKS, r"^    specattn (bench engines --grid \S* --modes plain,sketch-alone .*?)\n\n"),
    ("h200-sketch-qwen3", BENCHMARKS, r"^    specattn (bench engines --shape qwen3-8b.*?)\n\n"),
    ("h200-fp8", BENCHMARKS, r"^    specattn (bench engines --grid \S* --modes plain,eagle,sketch-eagle .*?)\n\n"),
    ("h200-hybrid", BENCHMARKS, r"^    specattn (bench engines --shape qwen3-next.*?)\n\n"),
    ("h200-gpt-oss", BENCHMARKS, r"^    specattn (bench engines --shape gpt-oss.*?)\n\n"),
    ("h200-moe", BENCHMARKS, r"^    specattn (bench engines --shape qwen3-30b.*?)\n\n"),
    ("h200-sketch-engine-128k", BENCHMARKS, r"^    specattn (bench engines --grid \S* \S*\s+--modes plain,sk.*?)\n\n"),
]


@pytest.mark.parametrize(("file", "document", "command"), TABLES, ids=[file for file, *_ in TABLES])
def test_the_tables_are_what_was_measured(file, document, command, capsys):
    """And the command above each runs the engines in it."""
    from specattn_vllm import cli
    from specattn_vllm.bench.report import markdown
    from specattn_vllm.bench.schema import Report

    measured = json.loads((ROOT / f"docs/results/{file}.json").read_text())
    assert markdown(Report.model_validate(measured)) in document
    [arguments] = re.findall(command, document, re.M | re.S)
    assert cli.main([*arguments.replace("\\\n", " ").split(), "--list", "--device", "cuda"]) == 0
    listed = re.findall(r"^(\S.*)\n  cells: ", capsys.readouterr().out, re.M)
    assert sorted(listed) == sorted(engine["name"] for engine in measured["engines"])


@pytest.mark.parametrize(
    ("file", "engine", "words"),
    [
        (
            "h200-self-speculation",
            "vegas 10%",
            "decodes 16 requests of 32k at {:,.0f} tokens per second, {:.2f} times plain decoding ({:,.0f} in the",
        ),
        ("h200-self-speculation-128k", "vegas 10%", "and 4 of 128k at {:,.0f}, {:.2f} times:"),
    ],
)
def test_the_speeds_measured_apart_are_what_was_measured(file, engine, words):
    from specattn_vllm.bench.report import markdown
    from specattn_vllm.bench.schema import Report

    measured = json.loads((ROOT / f"docs/results/{file}.json").read_text())
    table = markdown(Report.model_validate(measured)).split("\n\n")[0]
    assert table in BENCHMARKS
    speeds = {e["name"]: e["cells"][0]["tokens_per_second"] for e in measured["engines"]}
    faster = speeds[engine] / speeds["plain"]
    assert words.format(speeds[engine], faster, speeds["plain"]) in " ".join(BENCHMARKS.split())


def test_the_speed_of_choosing_by_the_draft_is_that_measured():
    speed = speeds_of("h200-engine", "16x32k")
    ours, plain, drafted = (speed[name] for name in ("specattn 10%", "plain", "draft-v1"))
    assert drafted > speed["draft-v2"]
    words = f"at {ours:,.0f} tokens per second with 10% read, {ours / plain:.2f} times plain decoding and "
    assert words + f"{ours / drafted:.2f} times the better" in " ".join(BENCHMARKS.split())


def test_the_table_of_servers_is_what_was_measured(capsys):
    """And the command above it serves them; so do the others of that section, with what their shapes have."""
    from specattn_vllm import cli
    from specattn_vllm.bench.serve.report import markdown
    from specattn_vllm.bench.serve.schema import ServeReport

    section = BENCHMARKS.split("## Serving\n")[1].split("\n## ")[0]
    measured = ServeReport.model_validate_json((ROOT / "docs/results/cpu-serve.json").read_text())
    assert markdown(measured) in section
    commands = re.findall(r"^    specattn (bench serve (?:.*\\\n)*.*)$", section, re.M)
    listed = []
    for command in commands:
        words = command.replace("\\\n", " ").replace("--target TARGET --draft DRAFT ", "").split()
        assert cli.main([*words, "--list"]) == 0
        listed.append(re.findall(r"^(\S.*)\n  vllm serve ", capsys.readouterr().out, re.M))
    assert listed == [
        ["plain", "draft-v2", "sketch", "sketch-alone"],
        ["plain", "sketch", "sketch-alone"],
        ["plain", "draft-v2", "sketch 8%", "sketch-alone 8%"],
        ["plain", "sketch 8%"],
    ]
    assert measured.provenance["command"] == f"specattn {' '.join(commands[1].replace(chr(92), ' ').split())}"
    assert [engine.name for engine in measured.engines] == listed[1]


def test_the_rounds_below_the_crossover_are_those_measured():
    def rounds(file: str, engine: str) -> dict[str, float]:
        engines = json.loads((ROOT / f"docs/results/{file}.json").read_text())["engines"]
        [cells] = [e["cells"] for e in engines if e["name"] == engine]
        return {cell["name"]: cell["milliseconds_per_round"] for cell in cells}

    steps_aside, always = (rounds(file, "specattn 25%") for file in ("h200-crossover", "h200-crossover-pruned"))
    told = [
        f"{steps_aside[cell]:.2f} and {always[cell]:.2f} of {cell.replace('x', ' x ')}" for cell in ("1x4k", "4x4k")
    ]
    assert f"pruned always: {', '.join(told)}, " in " ".join(BENCHMARKS.split())
    assert f"{steps_aside['1x32k']:.2f} and {always['1x32k']:.2f} of 1 x 32k" in BENCHMARKS


def speeds_of(file: str, cell: str) -> dict[str, float]:
    engines = json.loads((ROOT / f"docs/results/{file}.json").read_text())["engines"]
    return {e["name"]: next(c["tokens_per_second"] for c in e["cells"] if c["name"] == cell) for e in engines}


def test_the_engine_s_speeds_with_a_sketch_are_those_measured():
    page = " ".join((ROOT / "docs/sketch.md").read_text().split())
    speed = speeds_of("h200-sketch-engine", "16x32k")
    drafted, head, plain = (speed[name] for name in ("sketch 8%", "sketch-eagle 8%, 2.5 a round", "plain"))
    assert f"at {drafted:,.0f} tokens per second with a 1B draft model" in page
    assert f"at {head:,.0f} with a head of EAGLE-3's shape (2.5 tokens a round)" in page
    assert f", and plain decoding at {plain:,.0f} (" in page
    alone = speeds_of("h200-sketch-alone", "16x32k")
    assert f"they decode at {alone['sketch-alone 8%']:,.0f}, and plainly at {alone['plain']:,.0f}" in page


def test_what_the_readme_says_is_gained_is_what_was_measured():
    words = " ".join(README.split())
    speed, alone = speeds_of("h200-sketch-engine", "16x32k"), speeds_of("h200-sketch-alone", "16x32k")
    drafted, head, stock, plain = (
        speed[name] for name in ("sketch 8%", "sketch-eagle 8%, 2.5 a round", "eagle, 2.5 a round", "plain")
    )
    assert f"decode {drafted / plain:.2f} times as fast as plain decoding with a 1B draft model." in words
    words_of_head = f"it is {head / plain:.2f} times, which is {head / stock:.2f} times stock vLLM with that head."
    assert f"With a head of EAGLE-3's shape {words_of_head}" in words
    default = speeds_of("h200-sketch-default", "16x32k")
    assert f"[{default['sketch 12.5%'] / default['plain']:.2f} times](docs/benchmarks.md" in words
    tuning = " ".join((ROOT / "docs/tuning.md").read_text().split())
    assert f"{default['sketch 12.5%'] / default['plain']:.2f} times plain decoding with 0.125 (" in tuning
    assert f"and {drafted / plain:.2f} times with 0.08 (" in tuning
    assert f"Without a drafter it is {alone['sketch-alone 8%'] / alone['plain']:.2f} times." in words


def test_the_chart_of_the_readme_has_what_was_measured(tmp_path):
    """The script is run anew: the file that is there has the same numbers, in the same order."""
    import subprocess
    import sys

    out = tmp_path / "speed.svg"
    subprocess.run([sys.executable, "-P", ROOT / "scripts/pages/readme_chart.py", "--out", out], check=True)
    there, new = (re.findall(r">([^<>]+)</text>", file.read_text()) for file in (ROOT / "docs/images/speed.svg", out))
    assert there == new
    assert f"{speeds_of('h200-sketch-engine', '16x32k')['sketch 8%']:,.0f}" in there


def test_the_complete_command_of_the_readme_is_the_engine_that_was_measured():
    from vllm.engine.arg_utils import EngineArgs

    from specattn_vllm import compat

    compat.apply_all()
    line = README.split("The complete command of the figures above:\n\n```bash\nvllm serve TARGET ")[1].split("```")[0]
    words = shlex.split(line.replace("\\\n", " "))
    given = EngineArgs.from_cli_args(compat.serve_parser().parse_args(["--model", "TARGET", *words]))
    engines = json.loads((ROOT / "docs/results/h200-sketch-engine.json").read_text())["engines"]
    [measured] = [e["job"]["engine_arguments"] for e in engines if e["name"] == "sketch 8%"]
    for key in ("max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization", "attention_backend"):
        assert str(getattr(given, key)).lower().endswith(str(measured[key]).lower()), key
    assert given.spec_tokens == measured["speculative_config"]["num_speculative_tokens"]
    # A floor of 128 tokens is below 8% of every context that chooses.
    floor = {"method": "sketch", "min_tokens": 0}
    assert given.additional_config["specattn"] | floor == measured["additional_config"]["specattn"]


def test_what_limits_a_round_is_what_was_measured():
    """A cell below the crossover costs no more than the page says, and 4 x 128k takes what it says."""
    engines = json.loads((ROOT / "docs/results/h200-sketch-engine.json").read_text())["engines"]
    took = {(e["name"], c["name"]): c["milliseconds_per_round"] for e in engines for c in e["cells"]}
    model, head, plain = (took[name, "4x128k"] for name in ("sketch 8%", "sketch-eagle 8%, 3.5 a round", "plain"))
    words = " ".join(BENCHMARKS.split())
    assert f"takes {model:.1f} ms with the 1B draft model and {head:.1f} with a head" in words
    assert f"plain decoding takes {plain:.1f} for one token" in words
    short = took["sketch 8%", "1x512"] - took["sketch-eagle 8%, 3.5 a round", "1x512"]
    assert f"a round with it takes {short:.1f} ms longer than with the head" in words
    alone = json.loads((ROOT / "docs/results/h200-sketch-alone.json").read_text())["engines"]
    plain, ours = ({c["name"]: c["tokens_per_second"] for c in e["cells"]} for e in alone)
    assert min(ours[cell] / plain[cell] for cell in plain) > 0.97


def test_the_rounds_of_a_draft_model_without_graphs_are_those_measured():
    engines = json.loads((ROOT / "docs/results/h200-sketch-qwen3.json").read_text())["engines"]
    took = [c["milliseconds_per_round"] for e in engines if e["name"] == "draft-v2" for c in e["cells"]]
    assert f"takes {min(took):.0f} to {max(took):.0f} ms" in " ".join(BENCHMARKS.split())


def test_what_limits_self_speculation_is_what_was_measured():
    words = " ".join(BENCHMARKS.split())
    files = ("h200-sketch-engine", "h200-sketch-default")
    engines = [e for f in files for e in json.loads((ROOT / f"docs/results/{f}.json").read_text())["engines"]]
    took = {(e["name"], c["name"]): c["milliseconds_per_round"] for e in engines for c in e["cells"]}
    faster = speeds_of("h200-sketch-default", "16x32k")
    assert f"is {faster['vegas 12.5%'] / faster['plain']:.2f} times plain decoding at 16 x 32k (" in words
    assert f"a round takes {took['vegas 12.5%', '16x32k']:.1f} ms" in words
    step, plain, verification = took["plain", "16x512"], took["plain", "16x32k"], 23
    assert f"would take {step:.1f} ms each, as a plain step at 16 x 512" in words
    assert f"that is {5.08 * plain / (5 * step + verification):.1f} times at most" in words
    losing = [cell for cell in ("4x4k", "1x4k", "1x32k") if took["vegas 12.5%", cell] / 5.08 > took["plain", cell]]
    assert losing == ["4x4k", "1x4k", "1x32k"]


def test_the_gain_with_an_fp8_cache_is_compared_with_that_of_16_bits():
    speeds = [speeds_of("h200-sketch-engine", cell) for cell in ("16x32k", "4x128k")]
    gains = [of["sketch-eagle 8%, 2.5 a round"] / of["plain"] for of in speeds]
    words = " ".join(BENCHMARKS.split())
    assert f"reach {gains[0]:.2f} and {gains[1]:.2f} times plain decoding" in words
    short, long = (speeds_of("h200-fp8", cell) for cell in ("16x32k", "4x128k"))
    assert f"it reached {short['plain']:,.0f} at 16 x 32k and {long['plain']:,.0f} at 4 x 128k" in words
    gain = short["sketch-eagle 8%"] / short["plain"]
    assert f"in both, the head gives {gain:.2f} times." in " ".join(README.split())


def share_of_selection(cell: dict) -> float:
    """Of a round's time, by the device's clock."""
    batches = (cell["counts"]["rounds"] or cell["counts"]["verify_rows"]) / cell["batch"]
    return cell["counts"]["selection_ns"] / 1e6 / batches / cell["milliseconds_per_round"]


def test_the_gain_with_experts_and_with_windows_is_what_was_measured():
    words = " ".join(BENCHMARKS.split())
    _, stock, ours = (of["cells"][0] for of in json.loads((ROOT / "docs/results/h200-moe.json").read_text())["engines"])
    stock_ms, ms = stock["milliseconds_per_round"], ours["milliseconds_per_round"]
    assert f"A round takes {stock_ms:.1f} ms with stock vLLM and the head, and {ms:.1f} with `sketch`" in words
    assert f"The selection took {share_of_selection(ours):.0%} of its round" in words
    ours = json.loads((ROOT / "docs/results/h200-gpt-oss.json").read_text())["engines"][1]["cells"][0]
    told = f"Of a round of {ours['milliseconds_per_round']:.1f} ms at 16 x 32k, the selection took "
    assert told + f"{share_of_selection(ours):.0%}." in words


def test_the_cpu_s_table_is_what_was_measured():
    document = (ROOT / "docs/cpu.md").read_text()
    results = {r["mode"]: r for r in json.loads((ROOT / "docs/results/cpu.json").read_text())["results"]}
    # A newcomer without a GPU must not take the second row for what a CPU can do.
    assert "| plain decoding, stock vLLM as it comes: runner V1 |" in document
    assert "| plain decoding, stock vLLM on runner V2 |" in document
    assert "for trying and testing" in document and "on a CPU" in document
    stock = [("stock", "| |")] if "stock" in results else []
    assert stock or "(*)" in document, "what no report holds is owned up to"
    pruned = f"{results['specattn']['kv_read']:.1%} |"
    for mode, end in (*stock, ("plain", "| |"), ("dense", "100% |"), ("specattn", pruned)):
        result = results[mode]
        slowest, fastest = result["tokens_per_second_range"]
        speed = f"{result['tokens_per_second']:.1f} ({slowest:.1f} to {fastest:.1f})"
        length = f"{result['acceptance_length']:.2f} | " if "acceptance_length" in result else ""
        assert f"| {speed} | {length}{end}" in document
    for mode in ("plain", "specattn"):
        assert f"{results[mode]['prefill_tokens_per_second']:,}" in document
