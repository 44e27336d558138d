"""`specattn calibrate` on tiny pairs with random weights: what it writes, what it refuses, and how it goes on."""

import errno
import json
import os
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from specattn_vllm import cli, layer_map  # noqa: E402
from specattn_vllm.calibrate import maps, models, runner  # noqa: E402
from specattn_vllm.calibrate.command import state_file  # noqa: E402


def test_a_map_is_what_the_loader_takes_and_comes_out_the_same_again(pair, tmp_path, capsys, run):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        assert run(tmp_path / folder / "map.json", "--criterion", "papers") == 0
    written = (tmp_path / "one" / "map.json").read_bytes()
    assert written == (tmp_path / "two" / "map.json").read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["map.json"]
    data, read = json.loads(written), layer_map.read(tmp_path / "one" / "map.json")
    told = data["provenance"]
    assert read.calibrated and read.method == "specattn" and read.heads is None
    assert data["layers"] == maps.layer_path(torch.tensor(told["similarity"]))
    assert "head_similarity" not in told
    assert (told["windows"], told["tokens"], told["text"][0]["name"]) == (4, 1024, "text.txt")
    assert str(pair) not in written.decode()
    assert f"draft layer per target layer: {' '.join(map(str, data['layers']))}\n" in capsys.readouterr().out


def test_the_command_in_a_map_makes_the_same_map(pair, tmp_path, monkeypatch, run):
    """It has names in the place of paths, and every setting that is not left to the default."""
    (tmp_path / "again").mkdir()
    assert run(tmp_path / "map.json", "--method", "sts", "--ranks", "1", "--seed", "3", "--dense-layers", "1") == 0
    words = json.loads((tmp_path / "map.json").read_text())["provenance"]["command"].split()
    assert words.pop(0) == "specattn" and words[words.index("--out") + 1] == "map.json"
    for option in ("--target", "--draft", "--text"):
        words[words.index(option) + 1] = str(pair / words[words.index(option) + 1])
    words[words.index("--out") + 1] = str(tmp_path / "again" / "map.json")
    assert cli.main([*words, "--device", "cpu"]) == 0
    assert (tmp_path / "again" / "map.json").read_bytes() == (tmp_path / "map.json").read_bytes()


def test_a_map_follows_from_the_mean_over_windows_below_dense_layers(tmp_path, monkeypatch, run):
    base = torch.tensor([[0.0, -9.0], [-2.0, -1.0], [-2.0, -1.5]], dtype=torch.float64)
    others = iter([-3.0, -1.0, 1.0, 3.0])  # 0 on average
    monkeypatch.setattr(
        runner, "similarity_of_window", lambda *_, **__: {"layers": base + next(others) * torch.eye(3, 2)}
    )
    assert run(tmp_path / "map.json", "--criterion", "papers", "--dense-layers", "1") == 0
    data = json.loads((tmp_path / "map.json").read_text())
    assert data["provenance"]["similarity"] == base.tolist()
    assert data["layers"] == [None, 1, 1]


def test_a_head_map_follows_from_what_was_measured(tmp_path, capsys, run):
    out = tmp_path / "map.json"
    assert run(out, "--method", "sts", "--criterion", "papers", "--dense-layers", "1") == 0
    data, read = json.loads(out.read_text()), layer_map.read(out)
    told = data["provenance"]
    assert data["layers"][0] is data["heads"][0] is told["head_similarity"][0] is None
    assert data["layers"][1:] == maps.layer_path(torch.tensor(told["similarity"][1:]))
    for heads, values in zip(data["heads"][1:], told["head_similarity"][1:], strict=True):
        assert heads == [row.index(max(row)) for row in values]
    assert layer_map.resolve(str(out), read.target, read.draft, method="sts") == read
    heads = " ".join(f"{a},{b}" for a, b in data["heads"][1:])
    assert f"draft KV head per target KV head: - {heads}\n" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["specattn", "sts"])
def test_a_map_by_retained_attention_takes_the_best_layer_of_each(tmp_path, run, method):
    """Also where a later layer of the target then gets an earlier one of the draft."""
    assert run(tmp_path / "map.json", "--method", method, "--budget", "0.25") == 0
    data = json.loads((tmp_path / "map.json").read_text())
    told = data["provenance"]
    assert data["layers"] == [row.index(max(row)) for row in told["similarity"]]
    assert all(0 < value < 1 for row in told["similarity"] for value in row), "shares of a mass of one"
    assert (told["settings"]["criterion"], told["settings"]["budget"]) == ("retained", 0.25)
    if method == "sts":
        best = [[max(values) for values in rows] for rows in told["head_similarity"]]
        of_layers = [max(row) for row in told["similarity"]]
        assert [sum(row) / len(row) for row in best] == pytest.approx(of_layers, abs=1e-4)
        assert data["heads"] == [[row.index(max(row)) for row in rows] for rows in told["head_similarity"]]


def test_heads_stay_within_ranks(tmp_path, run):
    assert run(tmp_path / "map.json", "--method", "sts", "--ranks", "2") == 0
    assert json.loads((tmp_path / "map.json").read_text())["heads"] == [[0, 1]] * 3


@pytest.mark.parametrize(("at", "more"), [(0, ()), (2, ()), (3, ("--method", "sts")), (4, ("--method", "sts"))])
def test_an_interrupted_run_goes_on_and_gives_the_same_map(tmp_path, monkeypatch, capsys, run, at, more):
    """`at`: windows that were measured; with all four the map was not written."""
    whole, out = tmp_path / "whole" / "map.json", tmp_path / "cut" / "map.json"
    for path in (whole, out):
        path.parent.mkdir()
    assert run(whole, *more) == 0
    measured, real = [], runner.similarity_of_window

    def cut(*args, **kwargs):
        if len(measured) == at:
            raise KeyboardInterrupt
        measured.append(args)
        return real(*args, **kwargs)

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner, "similarity_of_window", cut)
        patch.setattr(runner, "as_json", interrupted)
        assert run(out, *more) == 130
    assert "to go on from" in capsys.readouterr().out
    assert not out.exists()
    assert state_file(out).exists() == (at > 0)
    again = []
    monkeypatch.setattr(
        runner, "similarity_of_window", lambda *args, **kwargs: again.append(args) or real(*args, **kwargs)
    )
    assert run(out, *more) == 0
    assert len(again) == 4 - at, "windows that had been measured were measured again"
    assert out.read_bytes() == whole.read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["map.json"]


def test_what_an_earlier_run_left_is_not_mixed_with_other_settings(tmp_path, monkeypatch, capsys, run):
    out = tmp_path / "map.json"

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner, "as_json", interrupted)
        assert run(out) == 130
    for other in (
        ("--seed", "1"),
        ("--queries", "8"),
        ("--criterion", "papers"),
        ("--budget", "0.5"),
        ("--method", "sts"),
        ("--dtype", "bfloat16"),
    ):
        assert run(out, *other) == 2
        assert "other models, text or settings" in capsys.readouterr().err
    for damaged in ("{", "[" * 100_000):
        state_file(out).write_text(damaged)
        assert run(out) == 2
        assert "cannot be resumed" in capsys.readouterr().err
    assert run(out, "--overwrite") == 0 and not state_file(out).exists()
    with monkeypatch.context() as patch:
        patch.setattr(runner, "as_json", interrupted)
        assert run(out, "--overwrite") == 130
    assert run(out) == 0, "what was to be overwritten stood in the way of going on"
    assert run(out) == 2
    assert f"--out {out} exists" in capsys.readouterr().err


def test_a_full_disk_leaves_no_half_written_file(tmp_path, monkeypatch, capsys, run):
    out = tmp_path / "map.json"
    real, written = os.fsync, []

    def full(number):
        written.append(number)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(number)

    monkeypatch.setattr(os, "fsync", full)
    assert run(out) == 2
    assert "map.json.state cannot be written: No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["map.json.state"]
    assert run(out) == 0  # space again: on from two windows
    assert len(written) == 3 + 2 + 1
    layer_map.read(out)


def test_a_map_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch, capsys, run):
    out = tmp_path / "map.json"
    out.write_text("old")

    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = runner.write_whole

    def only_the_map(path, data):
        monkeypatch.setattr(os, "fsync", lambda number: full(path, data))
        real(path, data)

    monkeypatch.setattr(runner, "write_whole", only_the_map)
    assert run(out, "--overwrite") == 2
    assert f"{out} cannot be written" in capsys.readouterr().err
    assert out.read_text() == "old" and state_file(out).exists()
    assert not out.with_name("map.json.part").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--windows", "0"), "--windows 0: at least 1"),
        (("--window", "63"), "--window 63: at least 64"),
        (("--ranks", "2"), "--ranks is for --method sts"),
        (("--method", "sts", "--ranks", "3"), "--ranks 3: does not divide the 2 KV heads of the target"),
        (("--method", "sts", "--ranks", "0"), "--ranks 0: at least 1"),
        (("--queries", "241"), "--queries 241: a window of 256 has 240"),
        (("--queries", "0"), "--queries 0: at least 1"),
        (("--seed", "-1"), "--seed -1: at least 0"),
        (("--criterion", "papers", "--budget", "0.5"), "--budget is for --criterion retained"),
        (("--dense-layers", "3"), "--dense-layers 3: the target has 3 layers"),
        (("--window", "1024"), "--window 1024: the target takes at most 512 tokens"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, capsys, more, message, run):
    assert run(tmp_path / "never.json", *more) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path, capsys, run):
    assert run(tmp_path / "never.json", "--device", "cuda") == 2
    assert "--device cuda: PyTorch finds no GPU" in capsys.readouterr().err


def test_attention_that_overflows_is_refused_and_leaves_nothing(tmp_path, monkeypatch, capsys, run):
    real = models.rows_of
    monkeypatch.setattr(models, "rows_of", lambda *args: real(*args) * float("nan"))
    assert run(tmp_path / "never.json") == 2
    assert "attention overflows: give --dtype bfloat16 or float32" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_calibrated(pair, tmp_path, capsys, make_model, run, make_tokenizer):
    def refused(message: str, **given: Path) -> None:
        arguments = [word for role, folder in given.items() for word in (f"--{role}", str(folder))]
        assert run(tmp_path / "never.json", *arguments) == 2
        assert message in capsys.readouterr().err

    make_tokenizer(make_model(tmp_path / "wide", 2, vocab_size=300))
    refused("vocabularies of 258 and 300 tokens", draft=tmp_path / "wide")
    make_tokenizer(make_model(tmp_path / "other", 2), special="<|start|>")
    refused("give different ids to the same text", draft=tmp_path / "other")
    make_model(tmp_path / "mute", 2)
    refused("its tokenizer cannot be loaded", draft=tmp_path / "mute")
    make_model(tmp_path / "sliding", 2, "MistralForCausalLM", sliding_window=64)
    refused("sliding-window attention is not supported", draft=tmp_path / "sliding")
    config = json.loads((pair / "target" / "config.json").read_text())
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    refused("architecture GPT2LMHeadModel is not supported", target=tmp_path / "gpt")
    (tmp_path / "gpt" / "config.json").write_text(json.dumps(config))
    refused("no *.safetensors file", target=tmp_path / "gpt")
    (tmp_path / "gpt" / "config.json").write_text("{")
    refused("config.json cannot be read", target=tmp_path / "gpt")
    (tmp_path / "empty").mkdir()
    refused("no config.json in this folder", target=tmp_path / "empty")
