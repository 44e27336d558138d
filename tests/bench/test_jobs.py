"""What `specattn bench` would run: the exact engine of each mode."""

import argparse
import json
import math

import pytest

from specattn_vllm import cpu_runner
from specattn_vllm.bench import command, jobs
from specattn_vllm.tools import models


def jobs_by_name(*words: str, shape: str = "llama-8b-1b") -> dict:
    """Of all modes on a GPU, but for what `words` ask for."""
    parser = argparse.ArgumentParser()
    command.engines_arguments(parser)
    given = ["--grid", "16x32k,4x128k,1x32k", "--modes", ",".join(jobs.MODES), "--kept", "0.25,0.05"]
    args = parser.parse_args([*given, "--device", "cuda", *words])
    return {job.name: job for job in jobs.make_jobs(args, models.load_shape(shape))}


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
    assert (sizes["vegas 5%"], sizes["eagle"], sizes["dense"]) == ([8, 32, 128], [1, 3, 4, 12, 16, 48], [6, 24, 96])
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
    assert len({config.vocab_size for config in configs.values()}) == 1
    sizes = {}
    for role, config in configs.items():
        assert config.head_dim in (64, 128, 256)
        written = shape.configs[role]["rope_parameters"]  # of all layers, or of each kind
        by_kind = {kind: rope for kind, rope in written.items() if isinstance(rope, dict)} or {"": written}
        for kind, rope in by_kind.items():
            read = config.rope_parameters[kind] if kind else config.rope_parameters
            assert read["rope_theta"] == rope["rope_theta"]
        attention = config.hidden_size * config.head_dim * 2 * (config.num_attention_heads + config.num_key_value_heads)
        many = getattr(config, "num_experts", getattr(config, "num_local_experts", 1))
        experts = many, getattr(config, "moe_intermediate_size", config.intermediate_size)
        layer = attention + 3 * config.hidden_size * math.prod(experts)
        embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
        sizes[role] = round((config.num_hidden_layers * layer + embeddings) / 1e9, 1)
    assert (sizes["target"], sizes.get("draft")) == {
        "llama-8b-1b": (8.0, 1.2),
        "qwen3-8b-0.6b": (8.2, 0.6),
        "qwen3-30b-a3b-0.6b": (30.5, 0.6),
        "gpt-oss-20b": (20.9, None),
        "gemma3-27b": (27.0, None),
        "qwen3-next-24-layers": (39.7, None),  # without its linear attention
        "demo": (0.0, 0.0),
        "tiny": (0.0, 0.0),
    }[name]
    assert (tmp_path / "target").is_dir() != shape.has_weights


@pytest.mark.parametrize(
    ("mode", "shape", "reason"),
    [("sketch", "qwen3-next-24-layers", "has no draft model"), ("eagle", "tiny", "has no head of EAGLE-3's")],
)
def test_modes_whose_drafter_the_shape_does_not_have(mode, shape, reason):
    with pytest.raises(ValueError, match=f"--modes {mode}: the shape {shape} {reason}"):
        jobs_by_name("--modes", mode, shape=shape)
