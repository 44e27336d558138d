"""How each server is started."""

from __future__ import annotations

import json
import re

import pytest

from specattn_vllm import cli
from specattn_vllm.bench.serve.jobs import flags


def listed(capsys, *words: str) -> dict[str, str]:
    assert cli.main(["bench", "serve", "--list", *words]) == 0
    return dict(re.findall(r"^(\S.*)\n((?:  .*\n)+)", capsys.readouterr().out, re.M))


def refusal(capsys, *words: str) -> str:
    assert cli.main(["bench", "serve", "--list", *words]) == 2
    return capsys.readouterr().err


def test_arguments_of_vllm_serve():
    given = {"enforce_eager": True, "async_scheduling": False, "max_num_seqs": 8, "additional_config": {"a": {"b": 1}}}
    assert flags(given) == [
        "--enforce-eager",
        "--no-async-scheduling",
        *("--max-num-seqs", "8"),
        *("--additional-config", '{"a": {"b": 1}}'),
    ]


def test_stock_vllm_is_as_it_comes_and_ours_has_its_defaults(capsys):
    modes = "plain,draft,sketch,sketch-alone,vegas"
    found = listed(capsys, "--modes", modes, "--device", "cuda", "--max-num-seqs", "3")
    assert list(found) == ["plain", "draft-v2", "sketch", "sketch-alone", "vegas"]
    assert all("vllm serve '{target}' --max-num-seqs 3 " in text for text in found.values())
    for stock in ("plain", "draft-v2"):
        assert "VLLM_PLUGINS=''" in found[stock] and "specattn" not in found[stock]
    assert "RUNNER" not in found["plain"] and "--speculative-config" not in found["plain"]
    for ours, drafter in (("sketch", "{draft}"), ("sketch-alone", None), ("vegas", "{target}")):
        assert "--attention-backend specattn" in found[ours] and "VLLM_PLUGINS='specattn'" in found[ours]
        method = json.loads(re.findall(r"--additional-config '(.*?)'", found[ours])[0])["specattn"]
        assert method == {"method": "vegas" if ours == "vegas" else "sketch"}
        assert (f'"model": "{drafter}"' in found[ours]) == (drafter is not None)
    # With weights, drafts are accepted by what the models say.
    assert "synthetic" not in json.dumps(found)


def test_all_servers_have_room_for_the_one_that_drafts_most(capsys):
    words = ("--modes", "plain,vegas", "--input-len", "1k,2k", "--output-len", "10", "--draft-tokens", "vegas:8")
    for text in listed(capsys, *words).values():
        assert f"--max-model-len {2048 + 10 + 2 * 9} " in text


def test_shares_and_options_are_servers_of_their_own(capsys):
    words = ("--modes", "plain,sketch-alone,vegas", "--kept", "0.1,0.05", "--option", "vegas:dilation=0")
    found = listed(capsys, *words)
    assert list(found) == ["plain", "sketch-alone 10%", "sketch-alone 5%", "vegas 10%", "vegas 5%"]
    assert '{"method": "sketch", "ratio": 0.05}' in found["sketch-alone 5%"]
    assert '{"method": "vegas", "ratio": 0.1, "dilation": 0}' in found["vegas 10%"]


def test_random_weights(capsys):
    words = ("--shape", "llama-8b-1b", "--modes", "plain,sketch,sketch-eagle,specattn")
    found = listed(capsys, *words, "--acceptance-length", "sketch:4")
    assert all("--load-format dummy" in text for text in found.values())
    lengths = {name: re.findall(r'"synthetic_acceptance_length": ([\d.]+)', text) for name, text in found.items()}
    assert lengths == {"plain": [], "sketch": ["4.0"], "sketch-eagle": ["3.5"], "specattn": ["3.5"]}
    assert '"layer_map": "uniform"' in found["specattn"]


def test_on_a_cpu(capsys):
    found = listed(capsys, "--device", "cpu", "--engine-argument", "max_num_batched_tokens=512")
    assert all("--dtype float32 --enforce-eager --max-num-batched-tokens 512" in text for text in found.values())


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--target some/model --modes plain,sketch", "--modes sketch: it has a drafter: give --draft MODEL, or take"),
        ("--modes eagle", "give --eagle MODEL"),
        ("--target /nowhere", "there is no such folder"),
        ("--shape tiny --device cpu --draft demo", "leave --target, --draft"),
        ("--shape tiny --device cpu --modes eagle", "the shape tiny has no head"),
        ("--acceptance-length 3", "is for --shape"),
        ("--shape llama-8b-1b --modes sketch --acceptance-length 9", "between 1 and --draft-tokens + 1 = 6"),
        ("--draft-tokens vegas:3", "no such mode in this run"),
        ("--option audit_share=0.1 --modes plain", "no mode of this run has a use for it"),
        ("--num-prompts 2", "at least one of each length (3)"),
    ],
)
def test_what_no_server_does_is_refused(words, why, capsys):
    assert why in refusal(capsys, *words.split())
