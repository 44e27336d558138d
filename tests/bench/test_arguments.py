"""What `specattn bench` is asked: cells, modes and options, what is refused, and what `--list` shows."""

import argparse
import json
import subprocess
import sys

import pytest

from specattn_vllm import cli
from specattn_vllm.bench import grid, jobs
from specattn_vllm.bench.grid import Cell
from specattn_vllm.tools.arguments import parse_list, parse_option, share


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("16x32k", Cell(16, 32768)),
        (" 1x256", Cell(1, 256)),
        ("4X128K", Cell(4, 131072)),
        ("2x1m", Cell(2, 1048576)),
    ],
)
def test_cells(text, cell):
    assert Cell.parse(text) == cell
    assert Cell.parse(str(cell)) == cell


@pytest.mark.parametrize("text", ["", "16", "16x", "x32k", "0x32k", "16x0", "-1x32k", "1x32kk", "1.5x32k", "1x3.2k"])
def test_what_is_no_cell_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a cell"):
        Cell.parse(text)


def test_the_order_keeps_the_prefix_cache_warm():
    cells = grid.parse_grid("4x128k,1x32k,16x32k,4x32k,64x4k")
    assert [str(cell) for cell in cells] == ["64x4k", "16x32k", "4x32k", "1x32k", "4x128k"]
    with pytest.raises(argparse.ArgumentTypeError, match="twice"):
        grid.parse_grid("4x32k,4x32768")


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("sparse_draft=true", ("sparse_draft", True)),
        ("top_p=0.9", ("top_p", 0.9)),
        ("dense_layers=[0, 1]", ("dense_layers", [0, 1])),
        ("combine=union", ("combine", "union")),
        ("layer_map=a=b", ("layer_map", "a=b")),
    ],
)
def test_options(text, option):
    assert parse_option(text) == option


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_option, "sparse_draft"),
        (parse_option, "=1"),
        (parse_list(jobs.parse_mode), "plain,fast"),
        (parse_list(jobs.parse_mode), "plain,plain"),
        (parse_list(share), "0.1,1.5"),
        (parse_list(share), "0"),
        (parse_list(share), "a"),
        (parse_list(share), "0.1,0.1"),
        (jobs.parse_for_mode(int), "4.5"),
        (jobs.parse_for_mode(int), "vegas:"),
        (jobs.parse_for_mode(int), ":4"),
        (jobs.parse_for_mode(int), "plain:4"),
        (jobs.parse_for_mode(int), "vegas 10%:4"),
    ],
)
def test_what_cannot_be_meant_is_refused(parse, text):
    with pytest.raises(argparse.ArgumentTypeError):
        parse(text)


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (int, "4", ("", 4)),
        (int, "vegas:4", ("vegas", 4)),
        (float, "sketch-eagle:3.25", ("sketch-eagle", 3.25)),
    ],
)
def test_a_value_for_all_or_for_one_mode(parse, text, value):
    assert jobs.parse_for_mode(parse)(text) == value


def test_list_shows_every_engine_and_runs_none(capsys):
    assert cli.main(["bench", "--list", "--modes", "plain,specattn", "--kept", "0.1", "--grid", "4x32k"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if not line.startswith(" ")] == ["plain", "specattn 10%"]
    assert '"max_fraction": 0.1' in out


def test_values_for_a_mode_on_the_command_line(capsys):
    given = ["--draft-tokens", "4", "--draft-tokens", "specattn:7", "--acceptance-length", "specattn:6"]
    assert cli.main(["bench", "--list", "--modes", "dense,specattn", "--kept", "0.1,0.05", *given]) == 0
    lines = capsys.readouterr().out.splitlines()
    engines = [json.loads(line.partition("vllm.LLM: ")[2]) for line in lines if "vllm.LLM" in line]
    found = [engine["speculative_config"] for engine in engines]
    assert [own["num_speculative_tokens"] for own in found] == [4, 7, 7]
    assert [own["synthetic_acceptance_length"] for own in found] == [3.5, 6, 6]


def test_engines_is_what_bench_does_if_nothing_else_is_named(capsys):
    outputs = []
    for arguments in (["bench", "--list"], ["bench", "engines", "--list"]):
        assert cli.main(arguments) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--option", "no_such=1"], "--option no_such: no mode of this run has a use for it"),
        (["--option", "combine=sum", "--modes", "dense,sketch"], "--option combine: no mode of this run"),
        (["--option", "sketch:sketch_bits=4", "--modes", "dense"], "--option sketch:sketch_bits: no mode of this run"),
        (["--option", "dense:combine=sum"], "combine = 'sum': method 'dense' has no such option"),
        (["--option", "combine=least"], "combine"),
        (["--acceptance-length", "7"], "--draft-tokens + 1 = 6"),
        (["--acceptance-length", "5", "--draft-tokens", "dense:3"], "5 for dense: between 1 and --draft-tokens"),
        (["--acceptance-length", "dense:-1"], "-1 for dense"),
        (["--modes", "plain,dense", "--draft-tokens", "specattn:4"], "--draft-tokens specattn: no such mode"),
        (["--acceptance-length", "3,7"], "7 for draft-v2, 7 a round: between 1 and --draft-tokens"),
    ],
)
def test_what_an_engine_would_refuse_is_refused_before_it_starts(capsys, arguments, message):
    assert cli.main(["bench", "--list", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--grid", "4"],
        ["--modes", "fast"],
        ["--shape", "gpt"],
        ["--kept", "a"],
        ["--draft-tokens", "x:4"],
        ["--acceptance-length", "a"],
        ["--draft-tokens", "vegas:0"],
        ["--repeats", "0"],
        ["--acceptance-length", "2,2"],
    ],
)
def test_wrong_arguments_exit_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *arguments])
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_the_command_line_loads_nothing_heavy():
    program = (
        "import sys; from specattn_vllm import cli\n"
        "assert cli.main(['bench', '--list']) == 0\n"
        "heavy = {'torch', 'vllm', 'triton', 'rich', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("words", [["engines", "--shape", "demo"], ["serve"]], ids=" ".join)
def test_a_gpu_that_is_not_there_is_refused_at_once(words, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("specattn_vllm.tools.provenance.has_gpu", lambda: False)
    out = tmp_path / "out.json"
    assert cli.main(["bench", *words, "--device", "cuda", "--out", str(out)]) == 2
    assert "--device cuda: no NVIDIA GPU was found" in capsys.readouterr().err
    assert not out.exists()
