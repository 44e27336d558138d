"""The command `specattn bench kernels`: a run in the interpreter, and on a GPU where there is one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from specattn_vllm import cli
from specattn_vllm.bench.kernels import command, rows


def run(tmp_path, *words: str, status: int = 0) -> dict:
    out = tmp_path / "kernels.json"
    assert cli.main(["bench", "kernels", "--out", str(out), *words]) == status
    return json.loads(out.read_text())


def test_the_command_line_loads_no_torch():
    code = (
        "import argparse, sys; from specattn_vllm.bench.kernels.command import add_arguments;"
        "p = argparse.ArgumentParser(); add_arguments(p); p.parse_args(['--list']);"
        "sys.exit('torch' in sys.modules or 'vllm' in sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("words", [("--grid", "16"), ("--grid", "0x4k"), ("--kept", "0"), ("--kept", "1.5")])
def test_what_cannot_be_measured_is_refused(words, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "kernels", *words])
    assert words[0] in capsys.readouterr().err


def test_rows_are_listed_and_chosen_by_their_beginning(capsys):
    assert cli.main(["bench", "kernels", "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(rows.ROWS)
    assert cli.main(["bench", "kernels", "--list", "--only", "draft,sketch scan"]) == 0
    assert capsys.readouterr().out.splitlines() == ["draft dense", "draft scores (against draft dense)", "sketch scan"]
    assert cli.main(["bench", "kernels", "--only", "magic"]) == 2
    assert "--only magic: no row begins so; there are dense, sparse per-head" in capsys.readouterr().err


def test_no_gpu_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "kernels"]) == 2
    assert "--device cpu" in capsys.readouterr().err


def test_a_run_in_the_interpreter(tmp_path, capsys):
    found = run(tmp_path, "--device", "cpu", "--only", "draft,sparse shared", "--commit", "abc1234")
    assert found["provenance"]["commit"] == "abc1234"
    assert found["settings"] == {"shape": "demo", "dtype": "float32", "kept": None}
    told = {row["name"]: row for row in found["rows"]}
    ours, theirs = told["draft scores"], told["draft dense"]
    assert ours["cell"] == "2x100" and ours["against"] == "draft dense"
    assert ours["speedup"] == pytest.approx(theirs["ms"] / ours["ms"], rel=0.1, abs=1e-3)
    assert ours["bound_ms"] == pytest.approx(ours["bytes"] / found["copy_gb_per_s"] / 1e6, abs=1e-5)
    assert "needs CUDA" in told["sparse shared fa3"]["skipped"]
    assert told["sparse shared"]["ms"] > 0
    assert "draft scores" in capsys.readouterr().out


def test_a_row_that_raises_does_not_end_the_others(tmp_path, monkeypatch, capsys):
    def broken(setup, *more):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(rows, "capture", broken)
    found = run(tmp_path, "--device", "cpu", "--only", "draft scores,sketch encode", status=1)
    assert [row.get("error") for row in found["rows"]] == ["RuntimeError: out of registers", None]
    assert "out of registers" in capsys.readouterr().out


def test_calls_take_turns():
    seen = []
    assert command.milliseconds([lambda: seen.append(1), lambda: seen.append(2)], False) >= 0
    assert seen == [1, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_run_on_the_gpu(tmp_path):
    found = run(tmp_path, "--grid", "2x2k")
    assert [row["error"] for row in found["rows"] if "error" in row] == []
    assert 100 < found["copy_gb_per_s"] < 20_000
    assert {row["name"] for row in found["rows"]} == {row.name for row in rows.ROWS}
