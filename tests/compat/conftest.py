"""Every test here runs in a process in which the plugin is registered."""

import pytest

pytest.importorskip("vllm")
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from specattn_vllm import plugin


@pytest.fixture(scope="module", autouse=True)
def registered():
    plugin.register()


@pytest.fixture(scope="module")
def ours():
    return AttentionBackendEnum["SPECATTN"]
