"""The entry point and the patches: applied once, found by vLLM, and out of the way of everybody else."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler

import pytest

pytest.importorskip("vllm")
import vllm
from vllm.config import AttentionConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu.spec_decode.standalone_ar import speculator as upstream
from vllm.v1.worker.worker_base import WorkerBase

from specattn_vllm import compat, plugin, versions

CLASS = "specattn_vllm.backend.backend.SpecAttnBackend"


@pytest.fixture(scope="module", autouse=True)
def registered():
    plugin.register()


@pytest.fixture(scope="module")
def ours():
    return AttentionBackendEnum["SPECATTN"]


def run_python(program: str, folder) -> dict:
    """What a program prints last, from a new interpreter."""
    path = folder / "program.py"
    path.write_text(program)
    result = subprocess.run([sys.executable, "-P", str(path)], capture_output=True, text=True, cwd=folder)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


# Registration


def patched() -> list:
    """Everything `register` replaces or adds."""
    return [
        EngineArgs.create_engine_config,
        EngineArgs.add_cli_args,
        upstream.StandaloneARSpeculator,
        WorkerBase.specattn_stats,
        WorkerBase.specattn_audit,
        type(current_platform).get_attn_backend_cls.__func__,
        AttentionBackendEnum["SPECATTN"],
        len(AttentionBackendEnum),
        list(AttentionBackendEnum.__members__),
    ]


def test_registering_again_changes_nothing():
    # vLLM calls plugins in every process, and in some twice: wrapping a wrapper would check and alias twice.
    before = patched()
    plugin.register()
    after = patched()
    assert all(a is b or a == b for a, b in zip(before[-2:], after[-2:], strict=True))
    assert all(a is b for a, b in zip(before[:-2], after[:-2], strict=True))


def test_patches_wrap_vllm_s_own_functions_once():
    for function in (EngineArgs.create_engine_config, EngineArgs.add_cli_args):
        assert function._specattn_patched
        assert not hasattr(function.__wrapped__, "_specattn_patched")
        assert function.__wrapped__.__module__ == "vllm.engine.arg_utils"
    assert upstream.StandaloneARSpeculator._specattn_patched
    assert isinstance(compat.stock_speculator(), type)
    assert compat.stock_speculator().__module__ == upstream.__name__


def test_registering_imports_neither_kernels_nor_cuda(tmp_path):
    report = run_python(
        "import json, sys\n"
        "import torch\n"
        "from specattn_vllm import plugin\n"
        "plugin.register()\n"
        "ours = [name for name in sys.modules if name.startswith('specattn_vllm')]\n"
        "print(json.dumps({'cuda': torch.cuda.is_initialized(), 'modules': sorted(ours)}))\n",
        tmp_path,
    )
    parts = ("", ".filled", ".graphs", ".leaned_on", ".names", ".patching", ".start", ".worker")
    names = (*(f"compat{part}" for part in parts), "data_file", "misplaced", "plugin", "request", "versions")
    modules = ["specattn_vllm", *(f"specattn_vllm.{name}" for name in names)]
    assert report == {"cuda": False, "modules": modules}


def test_importing_the_entry_point_imports_neither_torch_nor_vllm(tmp_path):
    # vLLM imports it in every process, also where another backend is used.
    report = run_python(
        "import json, sys\n"
        "import specattn_vllm.plugin\n"
        "print(json.dumps([name for name in ('torch', 'triton', 'vllm', 'pydantic') if name in sys.modules]))\n",
        tmp_path,
    )
    assert report == []


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("0.32.0", True),
        ("0.32.0+cpu", True),
        ("0.32.1.dev3+g1234567", True),
        ("0.33.9", True),
        ("0.33", True),
        ("0.31.9", False),
        ("0.34.0", False),
        ("0.3.2", False),
        ("1.32.0", False),
        ("1.0.0", False),
        ("dev", False),
        ("0", False),
        ("0.x.1", False),
        ("", False),
    ],
)
def test_supported_versions(version, supported):
    assert versions.is_supported(version) is supported


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "dev"])
def test_another_vllm_is_refused_with_the_range_and_the_ways_out(monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.setattr(compat, "apply_all", lambda: pytest.fail("patched a vLLM that is not supported"))
    with pytest.raises(RuntimeError) as caught:
        plugin.register()
    message = str(caught.value)
    assert f"supports vLLM >=0.32,<0.34, found {version}" in message
    assert "install a vLLM in that range, or remove specattn-vllm" in message
    assert "VLLM_PLUGINS" in message


# The backend's name


def test_the_name_leads_to_the_backend(ours):
    assert ours.get_path() == CLASS
    assert ours.get_class().get_name() == "SPECATTN"


@pytest.mark.parametrize("dumps", [pickle.dumps, ForkingPickler.dumps], ids=["pickle", "multiprocessing"])
def test_the_name_survives_a_pickle(ours, dumps):
    config = pickle.loads(dumps(AttentionConfig(backend="specattn")))
    assert config.backend is ours
    assert pickle.loads(pickle.dumps(AttentionBackendEnum.TRITON_ATTN)) is AttentionBackendEnum.TRITON_ATTN


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_name_survives_every_protocol(ours, protocol):
    assert pickle.loads(pickle.dumps(ours, protocol)) is ours
    assert copy.deepcopy(ours) is ours


def test_the_name_survives_a_pickle_that_a_spawned_worker_reads_before_its_plugins(ours, tmp_path):
    (tmp_path / "config.pickle").write_bytes(pickle.dumps({"backend": ours, "again": [ours]}))
    report = run_python(
        "import json, pathlib, pickle, sys\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum\n"
        "before = 'SPECATTN' in AttentionBackendEnum.__members__\n"
        "config = pickle.loads(pathlib.Path('config.pickle').read_bytes())\n"
        "member = config['backend']\n"
        "print(json.dumps({\n"
        "    'before': before,\n"
        "    'type': type(member).__name__,\n"
        "    'same': member is AttentionBackendEnum['SPECATTN'] is config['again'][0],\n"
        "    'class': member.get_class().__name__,\n"
        "}))\n",
        tmp_path,
    )
    assert report == {"before": False, "type": "AttentionBackendEnum", "same": True, "class": "SpecAttnBackend"}
