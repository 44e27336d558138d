"""Windows of token ids: how text is cut, and which is refused."""

import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from specattn_vllm import cli
from specattn_vllm.calibrate import text


def test_texts_that_cannot_be_used(pair, tmp_path, capsys, run):
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9" * 1000)
    stdlib = Path(sysconfig.get_path("stdlib")) / "difflib.py"
    for given, message in (
        (tmp_path / "short.txt", "9 tokens in all, and one window takes 256"),
        (tmp_path / "latin.txt", "latin.txt is not text in UTF-8"),
        (tmp_path / "absent.txt", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (stdlib, "difflib.py, which `specattn eval methods` evaluates on"),
    ):
        assert run(tmp_path / "never.json", "--text", str(given)) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["calibrate", "--target", str(pair / "target"), "--out", str(tmp_path / "never.json")]) == 2
    assert "only the demo pair brings its own" in capsys.readouterr().err
    assert not (tmp_path / "never.json").exists()


def test_windows_follow_the_text_and_begin_as_the_models_want(tmp_path):
    for name, content in (("a.txt", "abcdefg"), ("b.txt", "hij\nklmnop"), ("c.txt", "qrs")):
        (tmp_path / name).write_text(content)
    files = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]

    def cut(most: int) -> text.Windows:
        return text.windows(files, lambda part: [ord(letter) for letter in part], [0], 6, most)

    found = cut(10)
    assert ["".join(map(chr, row[1:])) for row in found.ids.tolist()] == ["abcde", "fghij", "\nklmn", "opqrs"]
    assert not found.ids[:, 0].any()
    assert [file["name"] for file in found.files] == ["a.txt", "b.txt", "c.txt"]
    assert [file["name"] for file in cut(2).files] == ["a.txt", "b.txt"]  # as far as it is needed


def test_a_file_is_read_in_parts_that_end_with_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "PART", 10)
    (tmp_path / "a.txt").write_text("12345\n7890\nabc\n" + "x" * 25 + "\nend")
    found = [*text.parts(tmp_path / "a.txt")]
    assert "".join(found) == (tmp_path / "a.txt").read_text()
    assert found[0] == "12345\n7890\n" and max(map(len, found)) == 20
