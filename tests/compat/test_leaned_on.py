"""What the plugin leans on in vLLM: there in each version that is declared, and missed where it is gone."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import vllm

from specattn_vllm import compat, plugin
from specattn_vllm.compat import leaned_on

INSTALLED = Path(vllm.__file__).parent
HERE = Path(__file__).parent


def symbol_of(lean: str) -> str:
    return lean.partition("(")[0]


def test_the_installed_vllm_has_all_of_it():
    assert leaned_on.remedy(INSTALLED, "x") is None
    assert len({symbol_of(lean) for lean in leaned_on.LEANED_ON}) == len(leaned_on.LEANED_ON)


@pytest.mark.parametrize("version", ["0.33.0"])
def test_other_versions_that_are_declared_have_all_of_it(version):
    """By what was recorded of their wheels (`record.py`)."""
    recorded = json.loads((HERE / f"vllm-{version}.json").read_text())
    lost = [leaned_on.problem(lean, recorded.get(symbol_of(lean))) for lean in leaned_on.LEANED_ON]
    assert [told for told in lost if told] == []


@pytest.mark.parametrize("lean", leaned_on.LEANED_ON, ids=symbol_of)
def test_each_loss_is_noticed(lean, monkeypatch):
    """A vLLM in which the name is another."""
    name = re.split(r"[.:]", symbol_of(lean))[-1]
    whole = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda path, **given: re.sub(rf"\b{name}\b", f"{name}_moved", whole(path, **given))
    )
    leaned_on._tree.cache_clear()
    try:
        module, _, symbol = symbol_of(lean).partition(":")
        assert leaned_on.problem(lean, leaned_on.signature(INSTALLED, lean)) == f"vllm.{module}.{symbol}"
    finally:
        leaned_on._tree.cache_clear()


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (None, "vllm.a.b:C.d"),
        ("", "argument x, y of vllm.a.b:C.d"),
        ("self, y, x", "arguments of vllm.a.b:C.d in the order x, y"),
        ("self, y, z", "argument x of vllm.a.b:C.d"),
        ("self, x, z, y", None),
    ],
)
def test_arguments_that_moved_are_noticed(found, told):
    assert leaned_on.problem("a.b:C.d(x, y)", found) == (told and told.replace("b:C", "b.C"))


def test_a_vllm_without_it_is_refused_by_name_with_the_ways_out(monkeypatch):
    monkeypatch.delenv(plugin.CHECKED, raising=False)
    monkeypatch.setattr(compat, "apply_all", lambda: pytest.fail("patched a vLLM that lacks something"))
    monkeypatch.setattr(leaned_on, "LEANED_ON", ("v1.worker.gpu.model_runner:GPUModelRunner.absent",))
    with pytest.raises(RuntimeError) as caught:
        plugin.register()
    message = str(caught.value)
    assert f"vLLM {vllm.__version__} does not have: vllm.v1.worker.gpu.model_runner.GPUModelRunner.absent." in message
    assert "or remove specattn-vllm (or leave 'specattn' out of VLLM_PLUGINS)" in message
    assert plugin.CHECKED not in os.environ


def test_it_is_looked_for_once_for_a_process_and_those_it_starts(monkeypatch):
    monkeypatch.delenv(plugin.CHECKED, raising=False)
    monkeypatch.setattr(compat, "apply_all", lambda: None)
    plugin.register()
    monkeypatch.setattr(leaned_on, "remedy", lambda *given: pytest.fail("looked for again"))
    plugin.register()
