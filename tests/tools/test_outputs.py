"""Files that commands write: where they cannot be, nothing is measured and no folder is made."""

from __future__ import annotations

import errno
import os

import pytest

from specattn_vllm import cli
from specattn_vllm.installed import UserError
from specattn_vllm.tools.outputs import write_json

WRITERS = pytest.mark.parametrize(
    "words",
    [
        ["bench", "--out"],
        ["bench", "--plot"],
        ["bench", "kernels", "--out"],
        ["bench", "table", "report.json", "--plot"],
        ["eval", "methods", "--out"],
        ["report", "report.json", "--out"],
        ["calibrate", "--out"],
    ],
    ids=" ".join,
)


def refusal(words: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    return capsys.readouterr().err


@WRITERS
def test_a_folder_that_is_not_there_is_not_made(words, tmp_path, capsys):
    path = tmp_path / "no" / "such" / "file"
    message = refusal([*words, str(path)], capsys)
    assert f"argument {words[-1]}: {path}: {path.parent}: there is no such folder" in message
    assert f"mkdir -p {path.parent}" in message
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_file(tmp_path, capsys):
    assert f"{tmp_path} is a folder" in refusal(["report", "x.json", "--out", str(tmp_path)], capsys)
    (tmp_path / "file").touch()
    message = refusal(["report", "x.json", "--out", str(tmp_path / "file" / "page.html")], capsys)
    assert f"{tmp_path / 'file'}: is no folder" in message


def test_a_folder_that_may_not_be_written_to(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "may not be written to" in refusal(["report", "x.json", "--out", str(tmp_path / "page.html")], capsys)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "gone" / "report.json"
    write_json(path, {"a": 1})
    before = path.read_text()

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot be written: No space left"):
        write_json(path, {"a": 2})
    assert path.read_text() == before and list(path.parent.iterdir()) == [path]
