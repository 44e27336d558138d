"""What docs/troubleshooting.md shows is what the doctor says, and the messages that it explains are the code's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from specattn_vllm import info
from specattn_vllm.doctor import findings
from specattn_vllm.doctor.command import as_text
from specattn_vllm.installed import demo_folder

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
SHOWN = re.findall(r"```text\n(.*?)```", PAGE, re.S)
SIZES = {
    "says": "M can be served",
    "buffers": {"scores": 2 * 2**30, "page tables": 2**29},
    "weights": 15 * 2**30,
    "largest": 2**31,
    "kv_per_token": 140_000,
    "kv_in_windows": 0,
    "kv_in_states": 0,
    "stateful_layers": 0,
    "sketch_share": 0.062,
    "max_num_seqs": 64,
    "max_model_len": 131_072,
    "room": int(21.6 * 2**30),
}
"""Of an 8B model on a GPU of 24 GiB."""


def told(found) -> str:
    return "".join(f"{as_text(finding)}\n" for finding in found)


def test_a_broken_installation(monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(info, "version_of", lambda name: None)
    assert told(findings.examine((), generate=False)) == SHOWN[0]


def test_a_plugin_that_is_left_out(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert told(findings.examine((), generate=False)) == SHOWN[1]


@pytest.mark.engine
def test_a_model_that_is_not_served(tmp_path):
    config = json.loads((demo_folder("target") / "config.json").read_text())
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert told(findings._engine((str(tmp_path), "--skip-tokenizer-init"))) == SHOWN[2]


def test_a_gpu_that_is_too_small(monkeypatch):
    monkeypatch.setattr(findings, "ask", lambda *_: SIZES)
    [_, memory] = findings._engine(("M",))
    assert told([memory]) == SHOWN[3]
    assert len(SHOWN) == 4


def test_the_messages_are_those_of_the_code_or_of_vllm():
    table = PAGE.split("## When a server does not start")[1].split("## When it serves")[0]
    messages = re.findall(r"^\| (`.*?) \|", table, re.M)
    assert len(messages) == 9
    sources = "".join(file.read_text() for file in (ROOT / "specattn_vllm").rglob("*.py"))
    for message in re.findall(r"`(.*?)`", " ".join(messages[:-1])):  # the last are vLLM's
        assert message in re.sub(r"\"\s*\n\s*f?\"", "", sources), message


def test_the_paths_of_the_compatibility_page_are_there():
    page = (ROOT / "docs/compatibility.md").read_text()
    paths = re.findall(r"tests/[\w/.]*\w", page)
    assert len(paths) > 8
    assert all((ROOT / path).exists() for path in paths), paths
