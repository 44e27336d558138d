"""Files that commands write: where they cannot be, nothing is measured and no folder is made."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from specattn_vllm import cli
from specattn_vllm.installed import UserError
from specattn_vllm.tools.outputs import document, fitted, write_json, write_whole

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


RESULTS = Path(__file__).parents[2] / "docs" / "results"


def results(kind: str) -> Path:
    """One of the reports that the documentation shows, of this kind."""
    return next(path for path in sorted(RESULTS.glob("*.json")) if json.loads(path.read_bytes()).get("kind") == kind)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["report", results("specattn-eval-methods"), "--out"], "page.html"),
        (["bench", "table", results("specattn-bench-engines"), "--plot"], "plot.svg"),
    ],
    ids=["report", "plot"],
)
def test_a_full_disk_leaves_the_old_file_of_a_command(words, name, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    out = tmp_path / name
    out.write_text("old")

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    command = [*map(str, words), str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert cli.main(command) == 2
    [line] = capsys.readouterr().err.splitlines()[-1:]
    assert f"{out} cannot be written: No space left on device" in line
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]
    assert cli.main(command) == 0
    assert out.read_bytes().startswith((b"<!doctype html>", b"<?xml"))


def test_a_drawing_of_an_unknown_kind_is_refused(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "plot.word"
    assert cli.main(["bench", "table", str(results("specattn-bench-engines")), "--plot", str(out)]) == 2
    assert f"--plot {out}" in capsys.readouterr().err and not out.exists()


def test_a_full_device_is_an_error_and_stays_a_device():
    """/dev/full answers every write as a full disk does. To a root user, a file in its place would be possible."""
    device = Path("/dev/full")
    if not device.is_char_device():
        pytest.skip("there is no /dev/full")
    with pytest.raises(UserError, match=r"^/dev/full cannot be written: No space left on device$"):
        write_json(device, {"a": 1})
    assert device.is_char_device()


def test_what_is_no_file_is_written_to_as_it_is(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, "found")
    assert os.read(reader, 100) == b"found" and pipe.is_fifo()
    os.close(reader)


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "report.json"
    link.symlink_to(tmp_path / "elsewhere" / "report.json")
    write_whole(link, "found")
    assert link.is_symlink() and (tmp_path / "elsewhere" / "report.json").read_text() == "found"


WIDE = document(
    ["context", "plain decoding", "sketch"],
    [["16 x 32k", "767", "2,690 (3.51x)"], ["1 x 4k", "199", "-"]],
    "Tokens per second of the whole batch.",
)


def test_a_table_fits_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    assert fitted(WIDE) == WIDE
    monkeypatch.setenv("COLUMNS", "32")
    shown = fitted(WIDE)
    assert max(map(len, shown.splitlines())) <= 32
    assert shown.startswith(
        "context\n\n16 x 32k\n  plain decoding  767\n  sketch          2,690 (3.51x)\n\n1 x 4k\n  plain decoding  199\n"
    )
    assert shown.endswith("\n\nTokens per second of the whole\nbatch.\n")


def test_in_a_file_or_a_pipe_a_table_stays_markdown(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "30")
    assert fitted(WIDE) == WIDE
