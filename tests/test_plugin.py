"""The entry point and the patches: applied once, found by vLLM, and out of the way of everybody else."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
import torch
import vllm
from transformers import LlamaConfig
from vllm.config import AttentionConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.worker.gpu import spec_decode
from vllm.v1.worker.gpu.spec_decode.standalone_ar import speculator as upstream
from vllm.v1.worker.worker_base import WorkerBase

from specattn_vllm import compat, plugin, versions
from specattn_vllm.stats import Counters

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
    parts = ("", ".graphs", ".leaned_on", ".names", ".start", ".worker")
    names = (*(f"compat{part}" for part in parts), "misplaced", "plugin", "request", "versions")
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


@pytest.mark.parametrize("name", ["specattn", "SPECATTN", "SpecAttn"])
def test_the_name_is_understood_in_any_case(name, ours):
    assert AttentionConfig(backend=name).backend is ours
    assert engine_args("--attention-backend", name).attention_backend in (name, ours)


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


# The command line


def engine_args(*arguments: str) -> AsyncEngineArgs:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return AsyncEngineArgs.from_cli_args(parser.parse_args([*arguments]))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--spec-model", "some/draft", "--spec-tokens", "4"],
        ["--speculative-model", "some/draft", "--num-speculative-tokens", "4"],
        ["--speculative-model=some/draft", "--num-speculative-tokens=4"],
        ["--speculative_model", "some/draft", "--num_speculative_tokens", "4"],
        ["--speculative_model=some/draft", "--num_speculative_tokens=4"],
    ],
    ids=" ".join,
)
def test_the_aliases_are_vllm_s_own_flags(arguments):
    args = engine_args(*arguments)
    assert (args.spec_model, args.spec_tokens) == ("some/draft", 4)


def test_an_alias_checks_its_value_as_the_flag_does(capsys):
    with pytest.raises(SystemExit):
        engine_args("--num-speculative-tokens", "many")
    assert "many" in capsys.readouterr().err


def test_each_alias_is_there_once():
    for add_cli_args in (EngineArgs.add_cli_args, AsyncEngineArgs.add_cli_args):
        parser = add_cli_args(FlexibleArgumentParser())
        flags = [flag for action in parser._actions for flag in action.option_strings]
        for flag in ("--spec-model", "--speculative-model", "--spec-tokens", "--num-speculative-tokens"):
            assert flags.count(flag) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--additional-config", '{"specattn": {"top_p": 0.5, "dense_layers": [1]}}'],
        ["--additional-config.specattn", '{"top_p": 0.5, "dense_layers": [1]}'],
        ["--additional-config.specattn.top_p", "0.5", "--additional-config.specattn.dense_layers", "[1]"],
    ],
    ids=["object", "dotted object", "dotted options"],
)
def test_options_reach_the_engine_arguments(arguments):
    assert engine_args(*arguments).additional_config == {"specattn": {"top_p": 0.5, "dense_layers": [1]}}


# The speculator


class Stock:
    """Stands for vLLM's speculator, which would allocate its buffers."""

    def __init__(self, *arguments) -> None:
        self.arguments = arguments


class Ours(Stock):
    pass


class Sketching(Stock):
    pass


@pytest.fixture
def stand_ins(monkeypatch):
    # Imported before its base class is replaced.
    from specattn_vllm.speculation import sketch_speculator, speculator

    monkeypatch.setattr(speculator, "SpecAttnSpeculator", Ours)
    monkeypatch.setattr(sketch_speculator, "SketchSpeculator", Sketching)
    monkeypatch.setattr(upstream, "StandaloneARSpeculator", Stock)
    compat.choose_speculator()


def engine_config(backend: str | None, **options):
    return SimpleNamespace(
        attention_config=AttentionConfig(backend=backend), additional_config={"specattn": options} if options else {}
    )


@pytest.mark.parametrize(
    ("backend", "options", "wanted"),
    [
        ("specattn", {}, Sketching),
        ("specattn", {"sparse_draft": False}, Ours),
        ("specattn", {"method": "specattn"}, Ours),
        ("specattn", {"method": "dense", "sparse_draft": True}, Sketching),
        (None, {}, Stock),
        ("TRITON_ATTN", {}, Stock),
        ("FLASH_ATTN", {}, Stock),
    ],
)
def test_only_our_backend_gets_our_speculator(stand_ins, backend, options, wanted):
    config, device = engine_config(backend, **options), torch.device("cpu")
    made = upstream.StandaloneARSpeculator(config, device)
    assert type(made) is wanted
    assert made.arguments == (config, device)
    assert compat.stock_speculator() is Stock


@pytest.mark.parametrize(("backend", "wanted"), [("specattn", Sketching), (None, Stock)])
def test_vllm_builds_the_speculator_through_the_name_that_is_replaced(
    stand_ins, tmp_path, monkeypatch, backend, wanted
):
    llama = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=64,
        vocab_size=128,
        max_position_embeddings=128,
    )
    llama.save_pretrained(tmp_path / "model")
    path = str(tmp_path / "model")
    config = EngineArgs(
        model=path,
        skip_tokenizer_init=True,
        enforce_eager=True,
        attention_backend=backend,
        speculative_config={"model": path, "num_speculative_tokens": 2},
    ).create_engine_config()
    assert type(spec_decode.init_speculator(config, torch.device("cpu"), None)) is wanted


def test_our_speculator_is_vllm_s_own_class_extended():
    from specattn_vllm.speculation.speculator import SpecAttnSpeculator

    assert issubclass(SpecAttnSpeculator, compat.stock_speculator())


# The CPU platform


on_cpu = pytest.mark.skipif(not current_platform.is_cpu(), reason="other platforms honour registered backends")


def selector(**changes) -> AttentionSelectorConfig:
    base = {"head_size": 64, "dtype": torch.float32, "kv_cache_dtype": "auto", "block_size": 16}
    return AttentionSelectorConfig(**base | changes)


@on_cpu
def test_the_cpu_platform_honours_our_backend(ours):
    assert current_platform.get_attn_backend_cls(ours, selector()) == CLASS
    assert current_platform.get_attn_backend_cls(ours, selector(), num_heads=8) == CLASS
    assert type(current_platform).get_attn_backend_cls(ours, selector()) == CLASS


@on_cpu
@pytest.mark.parametrize("backend", [None, "CPU_ATTN", "TRITON_ATTN"])
def test_the_cpu_platform_answers_as_before_for_other_backends(backend):
    platform = type(current_platform)
    original = platform.get_attn_backend_cls.__func__.__wrapped__
    member = AttentionBackendEnum[backend] if backend else None
    assert current_platform.get_attn_backend_cls(member, selector()) == original(platform, member, selector())
    assert current_platform.get_attn_backend_cls(member, selector()) == AttentionBackendEnum.CPU_ATTN.get_path()


@on_cpu
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_size": 32}, "head_size not supported"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype not supported"),
        ({"block_size": 8}, "block_size not supported"),
        ({"use_mla": True}, "MLA not supported"),
        ({"has_sink": True}, "attention sinks not supported"),
        ({"has_sliding_window": True}, "sliding window not supported"),
        ({"use_non_causal": True}, "non-causal attention not supported"),
        ({"use_kv_connector": True}, "KV connector not supported"),
    ],
)
def test_the_cpu_platform_refuses_what_the_backend_does_not_support(ours, changes, reason):
    with pytest.raises(ValueError, match=f"--attention-backend specattn cannot serve this model: .*{reason}"):
        current_platform.get_attn_backend_cls(ours, selector(**changes))


# Statistics of a worker


def worker(**speculator):
    """A worker whose runner has a speculator with these attributes."""
    instance = object.__new__(WorkerBase)
    instance.model_runner = SimpleNamespace(speculator=SimpleNamespace(**speculator))
    return instance


def test_a_worker_reports_its_counts():
    counters = Counters(torch.device("cpu"))
    counters.add(rounds=2, kv_read=torch.tensor(7))
    report = worker(counters=counters).specattn_stats()
    assert (report["rounds"], report["kv_read"], report["kv_full"]) == (2, 7, 0)
    assert json.loads(json.dumps(report)) == report


def test_a_worker_beside_a_drafter_of_vllm_s_reports_what_is_counted_of_it():
    beside = worker()
    beside.model_runner.specattn_counters = Counters(torch.device("cpu"))
    beside.model_runner.specattn_counters.add(rounds=3)
    assert beside.specattn_stats()["rounds"] == 3
    del beside.model_runner.speculator
    assert beside.specattn_stats()["rounds"] == 3


def test_a_worker_without_our_backend_reports_nothing():
    assert worker().specattn_stats() is None
    without = worker()
    del without.model_runner.speculator
    assert without.specattn_stats() is None
    assert without.specattn_audit() is None
    assert worker(audit=None).specattn_audit() is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["--attention-backend", "specattn"],
        ["--attention-config", '{"backend": "specattn"}'],
        ["--attention-config.backend", "specattn"],
    ],
    ids=["flag", "JSON", "dotted"],
)
def test_each_way_of_naming_the_backend_on_the_command_line(arguments):
    given = engine_args(*arguments)
    backend = given.attention_backend or given.attention_config.backend
    assert getattr(backend, "name", backend).upper() == "SPECATTN"
