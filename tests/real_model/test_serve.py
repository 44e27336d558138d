"""The command line that `scripts/serve` hands to vLLM, for the demo pair and for the real model. vLLM is not run."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAME = "SmolLM2-135M-Instruct"


@pytest.fixture
def serve(tmp_path, made_venv):
    """serve(*arguments) -> (return code, what vLLM was given, all output), in an environment whose vLLM echoes."""
    vllm = made_venv / "bin/vllm"
    vllm.write_text('#!/bin/sh\nprintf "GIVEN %s\\n" "$@"\n')
    vllm.chmod(0o755)
    made = tmp_path / "cache/specattn" / NAME
    made.mkdir(parents=True)
    (made / "conversion.json").write_text("{}")

    def run(*arguments):
        done = subprocess.run(
            [str(ROOT / "scripts/serve"), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "SPECATTN_VENV": str(made_venv), "XDG_CACHE_HOME": str(tmp_path / "cache")},
        )
        given = [line.removeprefix("GIVEN ") for line in done.stdout.splitlines() if line.startswith("GIVEN ")]
        return done.returncode, given, done.stdout + done.stderr

    run.model = made
    return run


def after(given: list[str], flag: str) -> str | None:
    return given[given.index(flag) + 1] if flag in given else None


def test_the_demo_pair_is_served_as_before(serve):
    code, given, text = serve("--port", "9000")
    assert code == 0, text
    assert given[0] == "serve" and given[1].endswith("demo/target")
    assert after(given, "--speculative-model").endswith("demo/draft")
    assert after(given, "--num-speculative-tokens") == "4"
    assert after(given, "--served-model-name") == "demo"
    assert given[-2:] == ["--port", "9000"] and not any(word.startswith("--additional-config") for word in given)
    assert "http://localhost:9000/v1/completions" in text and "/v1/chat" not in text


def test_the_real_model_needs_no_draft(serve):
    code, given, text = serve("--real", "--port", "9000")
    assert code == 0, text
    assert given[:2] == ["serve", str(serve.model)] and "--real" not in given
    assert after(given, "--speculative-model") is None
    assert after(given, "--additional-config.specattn.method") == "sketch"
    assert after(given, "--served-model-name") == NAME
    assert "curl http://localhost:9000/v1/chat/completions" in text and f'"model": "{NAME}"' in text


@pytest.mark.parametrize("form", [["--draft", "{}"], ["--draft={}"]])
def test_the_real_model_with_a_draft(serve, tmp_path, form):
    draft = tmp_path / "draft"
    draft.mkdir()
    (draft / "config.json").write_text("{}")
    code, given, text = serve("--real", *(word.format(draft) for word in form))
    assert code == 0, text
    assert after(given, "--speculative-model") == str(draft) and after(given, "--num-speculative-tokens") == "4"
    assert not any(word.startswith("--draft") for word in given)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--additional-config", '{"specattn": {"method": "dense"}}'],
        ['--additional-config={"specattn": {"method": "dense"}}'],
        ["--additional-config.specattn.method", "dense"],
        ["--additional-config.specattn.method=dense"],
    ],
)
def test_a_method_that_is_asked_for_stands_alone(serve, arguments):
    """vLLM would merge two forms, or refuse an option that is given twice."""
    code, given, text = serve("--real", *arguments)
    assert code == 0, text
    assert given[-len(arguments) :] == arguments and "sketch" not in given


def test_other_options_leave_the_method(serve):
    code, given, text = serve("--real", "--additional-config.specattn.ratio", "0.25")
    assert code == 0, text
    assert after(given, "--additional-config.specattn.method") == "sketch"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--real", "--draft"], "--draft needs the folder of a draft model"),
        (
            ["--real", "--draft", "absent"],
            "--draft absent holds no model (no config.json): scripts/models/distil_draft.py makes",
        ),
        (["--draft", "absent"], "--draft goes with --real"),
    ],
)
def test_what_does_not_fit_is_refused(serve, arguments, message):
    code, given, text = serve(*arguments)
    assert code == 1 and not given and message in text


def test_a_model_that_cannot_be_made_stops_the_server(serve):
    shutil.rmtree(serve.model)
    serve.model.mkdir()
    code, given, text = serve("--real")
    assert code == 1 and not given and "was not made by this script" in text
