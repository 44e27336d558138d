"""What a command needs and is not installed."""

from __future__ import annotations

import pytest

from specattn_vllm import cli, installed


def test_what_is_missing_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(
        installed.importlib.util, "find_spec", lambda name: None if name in ("matplotlib", "torch") else object()
    )
    with pytest.raises(cli.UserError, match=r"^matplotlib is not installed: pip install 'specattn-vllm\[bench\]'$"):
        installed.require(("rich", "matplotlib"))
    # That extra does not bring torch.
    with pytest.raises(cli.UserError, match=r"^torch is not installed, which vLLM brings: .*specattn-vllm\[gpu\]"):
        installed.require(("rich", "torch"))
