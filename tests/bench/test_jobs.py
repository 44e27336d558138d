"""What `specattn bench` would run: cells, modes and options, and the exact engine of each mode."""

import argparse
import json
import subprocess
import sys

import pytest

from specattn_vllm import cli, cpu_runner
from specattn_vllm.bench import command, grid, jobs
from specattn_vllm.bench.grid import Cell
from specattn_vllm.tools import models
from specattn_vllm.tools.arguments import parse_option, share


def jobs_by_name(*words: str, shape: str = "llama-8b-1b") -> dict:
    """Of all modes on a GPU, but for what `words` ask for."""
    parser = argparse.ArgumentParser()
    command.engines_arguments(parser)
    given = ["--grid", "16x32k,4x128k,1x32k", "--modes", ",".join(jobs.MODES), "--kept", "0.25,0.05"]
    args = parser.parse_args([*given, "--device", "cuda", *words])
    return {job.name: job for job in jobs.make_jobs(args, models.load_shape(shape))}


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
        (jobs.parse_list(jobs.parse_mode), "plain,fast"),
        (jobs.parse_list(jobs.parse_mode), "plain,plain"),
        (jobs.parse_list(share), "0.1,1.5"),
        (jobs.parse_list(share), "0"),
        (jobs.parse_list(share), "a"),
        (jobs.parse_list(share), "0.1,0.1"),
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


def test_a_job_per_mode_and_kept_fraction():
    assert list(jobs_by_name()) == [
        "plain",
        "draft-v2",
        "draft-v1",
        "eagle",
        "dense",
        "specattn 25%",
        "specattn 5%",
        "sketch 25%",
        "sketch 5%",
        "sketch-eagle 25%",
        "sketch-eagle 5%",
        "sketch-alone 25%",
        "sketch-alone 5%",
        "vegas 25%",
        "vegas 5%",
    ]


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


def test_stock_engines_are_stock():
    found = jobs_by_name()
    common = {
        "model": "{target}",
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "dtype": "bfloat16",
        "enable_prefix_caching": True,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 8192,
        "gpu_memory_utilization": 0.92,
        "seed": 0,
    }
    speculation = {
        "model": "{draft}",
        "method": "draft_model",
        "num_speculative_tokens": 5,
        "rejection_sample_method": "synthetic",
        "synthetic_acceptance_length": 3.5,
    }
    own = {}
    for name in ("plain", "draft-v2", "draft-v1"):
        arguments = dict(found[name].engine_arguments)
        assert {key: arguments.pop(key) for key in common} == common
        assert arguments.pop("max_model_len") <= 131072
        own[name] = arguments
    assert own == {
        "plain": {"compilation_config": {"cudagraph_capture_sizes": [1, 4, 16]}},
        "draft-v2": {"compilation_config": {"cudagraph_capture_sizes": [6, 24, 96]}, "speculative_config": speculation},
        "draft-v1": {
            "compilation_config": {"cudagraph_capture_sizes": [6, 12, 18, 24, 30, 96, 114]},
            "speculative_config": speculation,
        },
    }
    environments = {name: job.environment for name, job in found.items()}
    assert {name: environments[name]["VLLM_PLUGINS"] for name in own} == dict.fromkeys(own, "")
    assert {name: e["VLLM_USE_V2_MODEL_RUNNER"] for name, e in environments.items()} == {
        **dict.fromkeys(environments, "1"),
        "draft-v1": "0",
    }


def test_our_engines_differ_from_stock_in_the_backend_and_its_options_only():
    found = jobs_by_name("--option", "combine=union", "--option", "specattn:sink_tokens=8")
    stock = found["draft-v2"].engine_arguments
    by_draft = {"top_p": 1.0, "max_fraction": 0.05, "min_tokens": 0, "layer_map": "uniform"}
    expected = {
        "dense": {"method": "dense"},
        "specattn 5%": {"method": "specattn", **by_draft, "combine": "union", "sink_tokens": 8},
        "sketch 5%": {"method": "sketch", "ratio": 0.05, "min_tokens": 0},
    }
    for name, options in expected.items():
        arguments = dict(found[name].engine_arguments)
        assert arguments.pop("attention_backend") == "specattn"
        assert arguments.pop("additional_config") == {"specattn": options}
        assert arguments == stock
        assert found[name].environment["VLLM_PLUGINS"] == "specattn"


def test_a_target_that_drafts_for_itself():
    """Beside the options, what it drafts with is all that differs from the other modes of ours."""
    found = jobs_by_name()
    job, control = found["vegas 5%"], found["dense"]
    arguments, expected = dict(job.engine_arguments), dict(control.engine_arguments)
    assert arguments.pop("additional_config") == {"specattn": {"method": "vegas", "ratio": 0.05, "min_tokens": 0}}
    del expected["additional_config"]
    assert arguments.pop("speculative_config") == {**expected.pop("speculative_config"), "model": "{target}"}
    assert arguments == expected
    assert (job.environment, job.cells) == (control.environment, control.cells)


def test_rounds_of_a_mode():
    given = ["--draft-tokens", "vegas:7", "--draft-tokens", "eagle:2"]
    found, before = (
        jobs_by_name(*given, "--acceptance-length", "vegas:6", "--acceptance-length", "eagle:2"),
        jobs_by_name(),
    )
    speculation = {name: job.engine_arguments.get("speculative_config", {}) for name, job in found.items()}
    keys = ("num_speculative_tokens", "synthetic_acceptance_length")
    own = {name: tuple(map(of.get, keys)) for name, of in speculation.items()}
    assert own["vegas 25%"] == own["vegas 5%"] == (7, 6) and own["eagle"] == (2, 2)
    assert own["plain"] == own["sketch-alone 5%"] == (None, None)
    rest = ("draft-v2", "draft-v1", "dense", "specattn 25%", "sketch 5%", "sketch-eagle 25%")
    assert {own[name] for name in rest} == {(5, 3.5)}
    assert [(found[n].draft_tokens, found[n].acceptance_length) for n in ("vegas 5%", "eagle", "plain")] == [
        (7, 6),
        (2, 2),
        (0, None),
    ]
    sizes = {name: job.engine_arguments["compilation_config"]["cudagraph_capture_sizes"] for name, job in found.items()}
    assert (sizes["vegas 5%"], sizes["eagle"], sizes["dense"]) == ([8, 32, 128], [3, 12, 48], [6, 24, 96])
    # One set of prompts for all: the longest leaves room for the mode that drafts most.
    (cells,) = {tuple((cell.name, cell.prompt_tokens) for cell in job.cells) for job in found.values()}
    assert dict(cells)["4x128k"] < {c.name: c.prompt_tokens for c in before["dense"].cells}["4x128k"]
    assert dict(cells)["4x128k"] + found["vegas 5%"].generated_tokens + 2 * 8 <= 131_072
    # What is timed stays about the same, in rounds of another length.
    assert [found[n].generated_tokens for n in ("plain", "vegas 5%", "eagle")] == [94, 104, 79]


def test_what_is_generated_fits_into_the_engine():
    for job in jobs_by_name().values():
        lengths = {cell.name: cell.prompt_tokens for cell in job.cells}
        assert lengths["16x32k"] == lengths["1x32k"] == 32768
        assert 130_000 < lengths["4x128k"] < 131_072
        longest = lengths["4x128k"] + job.generated_tokens
        # Drafts of two rounds in flight, past the last token.
        assert longest + 2 * 6 <= job.engine_arguments["max_model_len"] <= 131_072


def test_a_model_without_room_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        jobs_by_name("--output-tokens", "8192", "--modes", "dense", shape="demo")


def test_an_engine_for_each_acceptance_length():
    words = "--modes plain,draft-v1,specattn --kept 0.1 --acceptance-length 2,3.5 --acceptance-length specattn:2,5"
    found = jobs_by_name(*words.split())
    lengths = {name: job.acceptance_length for name, job in found.items()}
    assert lengths == {
        "plain": None,
        "draft-v1, 2 a round": 2,
        "draft-v1, 3.5 a round": 3.5,
        "specattn 10%, 2 a round": 2,
        "specattn 10%, 5 a round": 5,
    }


def test_the_user_has_the_last_word():
    found = jobs_by_name("--engine-argument", "dtype=float16", "--option", "specattn:top_p=0.5")
    assert {job.engine_arguments["dtype"] for job in found.values()} == {"float16"}
    assert found["specattn 5%"].engine_arguments["additional_config"]["specattn"]["top_p"] == 0.5


def test_on_a_cpu():
    words = "--grid 2x256 --device cpu --modes specattn"
    job = jobs_by_name(*words.split(), shape="demo")["specattn 25%"]
    assert job.engine_arguments["dtype"] == "float32"
    assert job.engine_arguments["enforce_eager"] and job.on_cpu
    assert not {"load_format", "compilation_config", "gpu_memory_utilization"} & set(job.engine_arguments)
    assert cpu_runner.environment({})["PYTHONPATH"] not in json.dumps(job.model_dump(mode="json"))


def test_a_job_is_what_it_runs():
    first, same, other = (jobs_by_name(*words)["dense"] for words in ((), (), ("--repeats", "4")))
    assert first == same != other


@pytest.mark.parametrize("name", models.shape_names())
def test_shapes(name, tmp_path):
    from transformers import AutoConfig

    shape = models.load_shape(name)
    folders = models.model_folders(shape, tmp_path)
    configs = {role: AutoConfig.from_pretrained(folder) for role, folder in folders.items()}
    assert configs["target"].vocab_size == configs["draft"].vocab_size
    sizes = {}
    for role, config in configs.items():
        assert config.head_dim in (64, 128)
        assert config.rope_parameters["rope_theta"] == shape.configs[role]["rope_parameters"]["rope_theta"]
        attention = config.hidden_size * config.head_dim * 2 * (config.num_attention_heads + config.num_key_value_heads)
        layer = attention + 3 * config.hidden_size * config.intermediate_size
        embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
        sizes[role] = round((config.num_hidden_layers * layer + embeddings) / 1e9, 1)
    assert (sizes["target"], sizes["draft"]) == {
        "llama-8b-1b": (8.0, 1.2),
        "qwen3-8b-0.6b": (8.2, 0.6),
        "demo": (0.0, 0.0),
        "tiny": (0.0, 0.0),
    }[name]
    assert (tmp_path / "target").is_dir() != shape.has_weights


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
