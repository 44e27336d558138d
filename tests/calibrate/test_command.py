"""`specattn calibrate` on tiny pairs with random weights: what it writes, what it refuses, and how it goes on."""

import errno
import json
import os
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from specattn_vllm import cli, layer_map  # noqa: E402
from specattn_vllm.calibrate import arguments, measure, paths, result, runner, similarity, state  # noqa: E402
from specattn_vllm.options import SpecAttnOptions  # noqa: E402

BY_KL = ("--similarity", "kl", "--queries", "16")


def test_layers_that_gain_by_what_follows_copy():
    of = {"alone": torch.tensor([0.0, 0.9, 0.9, 0.5]), "followed": torch.tensor([0.0, 0.901, 0.91, 0.4])}
    assert result.copying(of, 4) == [False, False, True, False]
    assert result.copying(None, 2) == [False, False]


@pytest.mark.parametrize("more", [(), ("--induction", "none")])
def test_the_map_names_the_layers_that_copy(tmp_path, monkeypatch, capsys, more, run):
    monkeypatch.setattr(runner, "copying", lambda mass, layers: [mass is not None and j == 1 for j in range(layers)])
    given = []
    real = measure.cost_of_window
    monkeypatch.setattr(runner, "cost_of_window", lambda *args: given.append(args[2]) or real(*args))
    out = tmp_path / "map.json"
    assert run(out, *more) == 0
    data = json.loads(out.read_text())
    copies = [False, not more, False]
    assert given == [copies] * 4
    assert data["induction"] == (None if more else copies)
    assert ("retained" in data["provenance"]) == (not more)
    assert ("layers that copy: 1" in capsys.readouterr().out) == (not more)


@pytest.mark.parametrize(("more", "path"), [((), "free"), (BY_KL, "monotone"), (("--path", "monotone"), "monotone")])
def test_a_map_is_what_the_loader_takes_and_comes_out_the_same_again(pair, tmp_path, capsys, run, more, path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        assert run(tmp_path / folder / "map.json", *more, "--picture", str(tmp_path / folder / "map.png")) == 0
    written = (tmp_path / "one" / "map.json").read_bytes()
    assert written == (tmp_path / "two" / "map.json").read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["map.json", "map.png"]
    assert (tmp_path / "one" / "map.png").read_bytes().startswith(b"\x89PNG")
    data, read = json.loads(written), layer_map.read(tmp_path / "one" / "map.json")
    told = data["provenance"]
    assert read.calibrated and read.method == "specattn" and read.heads is None
    assert told["settings"]["path"] == path and f"--path {path}" in told["command"]
    assert data["layers"] == paths.layer_path(told["similarity"], path)
    assert ("epsilon" in told) == (more == BY_KL)
    assert len(data["shares"]) == 3 and sum(data["shares"]) == pytest.approx(3, abs=0.01)
    assert (told["windows"], told["tokens"], told["text"][0]["name"]) == (4, 1024, "text.txt")
    assert told["curves"]["cost_of_shares"] <= told["curves"]["cost_of_equal_shares"]
    assert str(pair) not in written.decode()
    assert "draft layer per target layer" in capsys.readouterr().out


def test_what_layers_are_chosen_by_is_what_they_then_retain(tmp_path, run):
    """Above `min_tokens`, which the other measurements do not know, both say the same."""
    assert run(tmp_path / "map.json", "--budget", "0.6", "--shares", "none") == 0
    data = json.loads((tmp_path / "map.json").read_text())
    chosen = [row[i] for row, i in zip(data["provenance"]["similarity"], data["layers"], strict=True)]
    assert chosen == pytest.approx(data["provenance"]["retained"]["alone"], abs=1e-4)
    assert chosen == [max(row) for row in data["provenance"]["similarity"]]


@pytest.mark.parametrize(("method", "budget"), [("specattn", 0.25), ("sts", 0.1)])
def test_the_budget_is_by_default_that_of_a_server_of_the_method(method, budget):
    args = cli.build_parser().parse_args(["calibrate", "--out", "x", "--method", method])
    arguments.fill_in(args)
    assert args.budget == SpecAttnOptions.parse({"method": method}).ratio == budget


@pytest.mark.parametrize("layers", ["retained", "kl", "jaccard"])
def test_a_head_map_follows_from_what_was_measured(tmp_path, run, layers):
    out = tmp_path / "map.json"
    assert run(out, "--method", "sts", "--similarity", layers, "--dense-layers", "1", "--shares", "mass") == 0
    data, read = json.loads(out.read_text()), layer_map.read(out)
    told = data["provenance"]
    assert data["layers"][0] is data["heads"][0] is data["shares"][0] is None
    for heads, values in zip(data["heads"][1:], told["head_similarity"][1:], strict=True):
        assert heads == [row.index(max(row)) for row in values]
    assert (told["settings"]["queries"] is None) == (layers == "retained")
    assert layer_map.resolve(str(out), read.target, read.draft, method="sts") == read
    assert "kl" not in told["curves"]


def test_heads_stay_within_ranks_and_shares_can_be_left_out(tmp_path, run):
    assert run(tmp_path / "map.json", "--method", "sts", "--ranks", "2", "--shares", "none") == 0
    data = json.loads((tmp_path / "map.json").read_text())
    assert data["heads"] == [[0, 1]] * 3 and data["shares"] is None


def test_layers_that_cost_too_much_stay_dense(tmp_path, capsys, run):
    assert run(tmp_path / "all.json") == 0
    told = json.loads((tmp_path / "all.json").read_text())["provenance"]["curves"]
    costs = [row[told["grid"].index(0.25)] for row in told["kl"]]
    worst = costs.index(max(costs))
    limit = (max(costs) + sorted(costs)[-2]) / 2
    assert run(tmp_path / "some.json", "--dense-above", str(limit)) == 0
    some = layer_map.read(tmp_path / "some.json")
    assert [j for j, i in enumerate(some.layers) if i is None] == [worst] == [
        j for j, share in enumerate(some.shares) if share is None]  # fmt: skip
    assert run(tmp_path / "none.json", "--dense-above", "0") == 2
    assert "every layer costs more" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["kl", "mass"])
def test_a_goal_of_what_is_retained_sets_the_budget(tmp_path, capsys, kind, run):
    assert run(tmp_path / "map.json", "--shares", kind, "--retain", "0.6") == 0
    told = json.loads((tmp_path / "map.json").read_text())["provenance"]["curves"]
    assert told["retained"] >= 0.6 and told["budget"] != 0.25
    assert f"ratio {told['budget']:g} retains {told['retained']:.1%}" in capsys.readouterr().out
    assert run(tmp_path / "less.json", "--shares", kind, "--budget", str(told["budget"] - 0.005)) == 0
    assert json.loads((tmp_path / "less.json").read_text())["provenance"]["curves"]["retained"] < told["retained"]


@pytest.mark.parametrize(
    ("part", "at", "more"),
    [
        ("retained_of_window", 0, ()),
        ("retained_of_window", 2, ()),
        ("similarity_of_window", 2, BY_KL),
        ("retained_of_window", 3, ("--method", "sts")),
        ("induction_of_window", 1, ()),
        ("cost_of_window", 2, ()),
    ],
)
def test_an_interrupted_run_goes_on_and_gives_the_same_map(tmp_path, monkeypatch, capsys, run, part, at, more):
    whole, out = tmp_path / "whole" / "map.json", tmp_path / "cut" / "map.json"
    for path in (whole, out):
        path.parent.mkdir()
    assert run(whole, *more) == 0
    measured, real = [], getattr(runner, part)

    def cut(*args):
        if len(measured) == at:
            raise KeyboardInterrupt
        measured.append(args)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(runner, part, cut)
        assert run(out, *more) == 130
    assert "this goes on from" in capsys.readouterr().out
    assert not out.exists()
    assert state.state_file(out).exists() == (at > 0)
    again = []
    monkeypatch.setattr(runner, part, lambda *args: again.append(args) or real(*args))
    assert run(out, *more) == 0
    assert len(again) == 4 - at, "windows that had been measured were measured again"
    assert out.read_bytes() == whole.read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["map.json"]


def test_what_an_earlier_run_left_is_not_mixed_with_other_settings(tmp_path, monkeypatch, capsys, run):
    out = tmp_path / "map.json"

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner, "cost_of_window", interrupted)
        assert run(out) == 130
    for other in (("--seed", "1"), BY_KL, ("--path", "monotone")):
        assert run(out, *other) == 2
        assert "other models, text or settings" in capsys.readouterr().err
    state.state_file(out).write_text("{")
    assert run(out) == 2
    assert "cannot be gone on from" in capsys.readouterr().err
    assert run(out, "--overwrite") == 0 and not state.state_file(out).exists()
    with monkeypatch.context() as patch:
        patch.setattr(runner, "cost_of_window", interrupted)
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
    assert len(written) == 3 + 2 + 4 + 4 + 1
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
    assert out.read_text() == "old" and state.state_file(out).exists()
    assert not out.with_name("map.json.part").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--windows", "0"), "--windows 0: at least 1"),
        (("--ranks", "2"), "--ranks is for --method sts"),
        (("--method", "sts", "--ranks", "3"), "--ranks 3: does not divide the 2 KV heads of the target"),
        (("--method", "sts", "--ranks", "0"), "--ranks 0: at least 1"),
        (("--similarity", "kl", "--queries", "250"), "--queries 250: a window of 256 has 240"),
        (("--similarity", "kl", "--queries", "0"), "--queries 0: at least 1"),
        (("--queries", "16"), "--queries is for other similarities than retained"),
        (("--method", "sts", "--queries", "16"), "--queries is for other similarities than retained"),
        (("--rounds", "30"), "take more than half of a window of 256"),
        (("--budget", "1.5"), "--budget 1.5: more than 0, at most 1"),
        (("--budget", "0"), "--budget 0.0: more than 0, at most 1"),
        (("--retain", "1"), "--retain 1.0: more than 0, less than 1"),
        (("--retain", "0.9", "--shares", "none"), "--retain is for --shares kl and mass"),
        (("--dense-above", "0.1", "--shares", "mass"), "--dense-above is for --shares kl"),
        (("--dense-layers", "3"), "--dense-layers 3: the target has 3 layers"),
        (("--window", "1024", "--rounds", "3"), "--window 1024: the target takes at most 512 tokens"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(tmp_path, capsys, more, message, run):
    assert run(tmp_path / "never.json", *more) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path, capsys, run):
    assert run(tmp_path / "never.json", "--device", "cuda") == 2
    assert "--device cuda: PyTorch finds no GPU" in capsys.readouterr().err


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


def test_the_command_line_and_the_package_know_the_same_words():
    parser = cli.build_parser()
    for path in arguments.PATHS:
        assert parser.parse_args(["calibrate", "--out", "x", "--path", path]).path == path
    for kind in ("retained", *similarity.SIMILARITIES):
        assert parser.parse_args(["calibrate", "--out", "x", "--similarity", kind]).similarity == kind
