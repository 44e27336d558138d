"""Which settings `specattn eval methods` runs, and which it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from specattn_vllm import cli
from specattn_vllm.evaluation import command, runner, settings
from specattn_vllm.evaluation.schema import Setting
from specattn_vllm.installed import UserError

ROOT = Path(__file__).parents[2]
DEMO_MAP = ROOT / "configs/demo.json"
HALF = Setting(name="half", options={"method": "specattn", "rule": "top_k", "ratio": 0.5})


def test_the_default_settings_are_what_the_plugin_takes_and_begin_with_the_reference():
    found = settings.default_settings(4096)
    assert found[0].is_reference
    assert not any(setting.is_reference for setting in found[1:])
    assert len({setting.name for setting in found}) == len(found)


def test_without_choice_as_many_tokens_are_kept_as_with_it_the_first_and_the_last():
    import torch

    from specattn_vllm.kernels.reference import select_top_p, unpack_bits

    options = next(s.options for s in settings.default_settings(400) if s.name == "first and last 25%")
    mass = torch.rand(1, 400, generator=torch.Generator().manual_seed(0))
    bits, counts = torch.empty(1, 13, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    select_top_p(
        mass / mass.sum(),
        torch.tensor([400], dtype=torch.int32),
        bits,
        counts,
        options["top_p"],
        options["min_tokens"],
        -1,
        1.0,
        options["sink_tokens"],
        options["recent_tokens"],
        False,
    )
    kept = unpack_bits(bits, 400)[0].nonzero().flatten().tolist()
    assert kept == [*range(4), *range(400 - 96, 400)]


def test_the_dense_run_comes_first_whatever_is_asked_for():
    both = [HALF, Setting(name="everything", options={"method": "dense"})]
    assert [s.name for s in settings.chosen(both, [])] == ["everything", "half"]
    assert [s.name for s in settings.chosen(both, ["half"])] == ["everything", "half"]
    assert [s.name for s in settings.chosen([HALF], [])] == ["dense", "half"]


@pytest.mark.parametrize(
    ("given", "only", "message"),
    [
        ([HALF], ["whole"], "--only 'whole': there is no such setting; there are 'half'"),
        ([HALF, HALF], [], "two settings are called 'half'"),
        ([HALF.model_copy(update={"name": "dense"})], [], "is called 'dense' and is not"),
    ],
)
def test_settings_that_cannot_stand_together_are_refused(given, only, message):
    with pytest.raises(UserError, match=message):
        settings.chosen(given, only)


@pytest.mark.parametrize(
    ("speculation", "message"),
    [
        ("null", r"speculative_config=null: .* leave it out .*docs/evaluation.md, Tasks"),
        ('{"method": "ngram", "num_speculative_tokens": 4}', "method 'ngram': .*'eagle'.*docs/evaluation.md, Tasks"),
        ('{"method": "dspark", "model": "d", "num_speculative_tokens": 4}', "method 'dspark'"),
        ('{"method": "eagle", "model": "d", "num_speculative_tokens": 3}', "--draft-tokens 4: .* give the same"),
    ],
)
def test_a_drafter_that_cannot_be_led_is_refused_before_an_engine_starts(
    speculation, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(runner, "run_all", lambda *given, **more: pytest.fail("ran"))
    given = ["--only", "dense", "--engine-argument", f"speculative_config={speculation}"]
    assert cli.main(["eval", "methods", "--device", "cpu", "--out", str(tmp_path / "out.json"), *given]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("method", [None, "draft_model", "eagle", "eagle3", "mtp", "deepseek_mtp"])
def test_drafters_that_can_be_led_are_taken(method):
    given = {"model": "d", "num_speculative_tokens": 4} | ({"method": method} if method else {})
    command.refuse_what_cannot_be_led({"speculative_config": given}, 4)
    command.refuse_what_cannot_be_led({}, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"name": "x", "options": {"method": "magic"}}]', r"0.options: .*method = 'magic'"),
        ('[{"name": "x", "options": {"top_q": 1}}]', "top_q: unknown option"),
        ('[{"name": "x"}]', "0.options: Field required"),
        ('[{"name": "x", "options": {}, "draft": "other"}]', "0.draft: Extra inputs are not permitted"),
        ('[{"name": "x", "options": {}, "other_batches": true}]', "'other_batches' is the dense run once more"),
        (
            '[{"name": "x", "options": {"method": "dense"}, "other_batches": true, "fp8_cache": true}]',
            "without a baseline and without fp8_cache",
        ),
        ("{", "Invalid JSON"),
    ],
)
def test_a_settings_file_that_cannot_run_is_refused_before_any_engine(text, message, tmp_path, capsys):
    path = tmp_path / "settings.json"
    path.write_text(text)
    assert cli.main(["eval", "methods", "--settings", str(path), "--list"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_settings_file_takes_the_place_of_ours(tmp_path, capsys):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps([HALF.model_dump(exclude_none=True)]))
    assert cli.main(["eval", "methods", "--settings", str(path), "--list"]) == 0
    assert capsys.readouterr().out.splitlines()[::2] == ["dense", "half"]


@pytest.mark.parametrize("name", ["documents", "context", "positions", "draft-tokens", "batch", "free-tokens"])
def test_counts_that_make_no_evaluation_are_refused(name, capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval", "methods", f"--{name}", "0"])
    assert f"--{name}: 0: a whole number, at least" in capsys.readouterr().err


def test_graphs_are_refused_with_baselines(capsys):
    arguments = ["eval", "methods", "--only", "quest 25%", "--engine-argument", "enforce_eager=false"]
    assert cli.main(arguments) == 2
    assert "enforce_eager=false: 'quest 25%' is a baseline" in capsys.readouterr().err


def test_a_layer_map_is_for_those_that_choose_by_a_draft_and_name_none(capsys, tmp_path):
    path = tmp_path / "settings.json"
    own = Setting(name="own", options={"method": "specattn", "layer_map": "uniform"})
    others = [Setting(name="vegas", options={"method": "vegas"}), Setting(name="sketch", options={"method": "sketch"})]
    baseline = Setting(name="oracle", options={"method": "dense"}, baseline={"name": "oracle", "ratio": 0.5})
    given = [HALF, Setting(name="sts", options={"method": "sts"}), own, *others, baseline]
    path.write_text(json.dumps([setting.model_dump() for setting in given]))
    arguments = ["eval", "methods", "--settings", str(path), "--list", "--layer-map"]
    assert cli.main([*arguments, str(DEMO_MAP)]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {name: json.loads(told) for name, told in zip(lines[::2], lines[1::2], strict=True)}
    assert {name for name, options in listed.items() if options.get("layer_map") == str(DEMO_MAP)} == {"half", "sts"}
    assert listed["own"]["layer_map"] == "uniform"
    assert cli.main([*arguments, str(tmp_path / "nowhere.json")]) == 2
    assert "--layer-map: layer_map = " in capsys.readouterr().err


def test_the_settings_of_the_real_model_read_as_many_bytes_as_they_are_called_by():
    found = settings.read_settings(ROOT / "docs/settings/real.json")
    assert found[0].is_reference and found[1].other_batches
    named = [(setting, re.search(r"([\d.]+)%$", setting.name)) for setting in found]
    for setting, share in named:
        ratio = setting.options.get("ratio") if setting.baseline is None else setting.baseline.ratio
        if share is not None and ratio is not None:
            # Less what a round reads of itself, and whole pages round up.
            assert setting.scan_share(64) + ratio == pytest.approx(float(share[1]) / 100, abs=1e-3), setting.name
    assert {setting.baseline.name for setting in found if setting.baseline} == {
        "quest",
        "mean_std",
        "channels",
        "oracle",
    }
