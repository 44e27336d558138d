"""Engines in this process, real held-out code as prompts, and an audit of every selection that is read."""

from __future__ import annotations

import atexit
import functools
import gc
import hashlib
import importlib.util
import json
import os
import re
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest

# One process: tests look inside the worker.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

DEMO = Path(__file__).parents[2] / "specattn_vllm" / "demo"


@pytest.fixture(scope="session")
def demo_pair() -> tuple[str, str]:
    """Folders of the target and the draft that ship with the package."""
    return str(DEMO / "target"), str(DEMO / "draft")


@pytest.fixture(scope="session")
def held_out_code() -> str:
    """Python source that the demo pair was not trained on: modules of the standard library."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    names = ("argparse.py", "ast.py", "asyncio/base_events.py", "calendar.py", "configparser.py", "dataclasses.py")
    return "\n\n".join((stdlib / name).read_text() for name in names)


@pytest.fixture(scope="session")
def prompts(demo_pair, held_out_code):
    """prompts(lengths): one list of token ids per length, each from another place of the held-out code."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(demo_pair[0])(held_out_code, add_special_tokens=False).input_ids

    def cut(lengths: list[int]) -> list[dict]:
        stride = (len(ids) - max(lengths)) // max(1, len(lengths))
        return [{"prompt_token_ids": ids[i * stride : i * stride + n]} for i, n in enumerate(lengths)]

    return cut


def _beside(name: str):
    """A module of this folder: tests are no package, so one of them cannot import another."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sketch_audit(monkeypatch):
    """Checks every choice that engines of method 'sketch' make from then on; counts them."""
    found = _beside("sketch_audit").Audit()
    found.watch(monkeypatch)
    return found


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """tiny_model(name) -> folder of that model of `tiny_models.py`, made when it is first asked for."""
    module = _beside("tiny_models")
    folder = tmp_path_factory.mktemp("tiny")
    return functools.cache(lambda name: module.MODELS[name](folder / name))


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """family(name) -> folder of that model of `families.py`, made when it is first asked for."""
    module = _beside("families")
    folder = tmp_path_factory.mktemp("families")
    return functools.cache(lambda name: module.make(name, folder / name))


@pytest.fixture
def small_pool():
    """Arguments of an engine with blocks for the prompts of four requests, `lengths`, and few more: some of them lose
    their slot within 40 tokens, and come back."""
    arguments = {"max_num_seqs": 4, "block_size": 16, "num_gpu_blocks_override": 116, "max_model_len": 1024}
    return SimpleNamespace(arguments=arguments, lengths=[420, 430, 440, 450])


_freeze, _thaw = gc.freeze, gc.unfreeze
_engines = 0


def leave_imports_alone() -> None:
    """vLLM looks through all objects for garbage a dozen times for each engine: a third of the time of these tests.
    Those of imports are none: they are frozen before the first engine and, as it imports more, before the second. vLLM
    itself freezes the engine's objects too, and thaws all of them at its end, which would undo it."""
    global _engines
    _engines += 1
    if _engines <= 2:
        gc.collect()
        _freeze()
        gc.freeze = gc.unfreeze = lambda: None
        atexit.register(_thaw)  # libraries look at what is left of them


@pytest.fixture
def engine(demo_pair):
    """engine(options, **vllm_arguments) -> LLM; options None is stock vLLM without speculation. Elsewhere a pair
    speculates, unless there is a `speculative_config`, and a method that is not named is 'specattn'."""
    import torch
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    if not torch.cuda.is_available():
        from specattn_vllm.cpu_runner.interpreter import leave_out_needless_work

        leave_out_needless_work()  # as in every engine of ours, and for stock ones beside them
    made = []

    def make(
        options: dict | None = None,
        *,
        num_speculative_tokens: int = 4,
        drafts_by_batch_size: list[tuple[int, int, int]] | None = None,
        target: str | None = None,
        draft: str | None = None,
        **arguments,
    ):
        """drafts_by_batch_size: (fewest requests, most requests, drafts), where not always as many are drafted."""
        close()
        arguments = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 4608,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 1024,
            "distributed_executor_backend": "uni",
            "gpu_memory_utilization": 0.1,
            **arguments,
        }
        if torch.cuda.is_available():
            # Others may use the GPU too: neither profile its memory nor ask for most of it.
            arguments.setdefault("kv_cache_memory_bytes", 4 << 30)
        else:
            # 40k tokens. All that VLLM_CPU_KVCACHE_SPACE allows would be filled with zeros at each start.
            arguments.setdefault("num_gpu_blocks_override", 40960 // arguments.get("block_size", 128))
        if options is not None:
            options = {"method": "specattn"} | options
            arguments["attention_backend"] = "specattn"
            arguments["additional_config"] = {"specattn": options}
            for_itself = options.get("method") in ("vegas", "streamingllm")
            pair = {
                "method": "draft_model",
                "model": (target or demo_pair[0]) if for_itself else draft or demo_pair[1],
                "num_speculative_tokens": num_speculative_tokens,
            }
            if drafts_by_batch_size is not None:
                pair["num_speculative_tokens_per_batch_size"] = drafts_by_batch_size
            arguments.setdefault("speculative_config", pair)
        torch.manual_seed(0)
        leave_imports_alone()
        made.append(LLM(target or demo_pair[0], **arguments))
        return made[-1]

    def close():
        while made:
            made.pop().llm_engine.engine_core.shutdown()
            cleanup_dist_env_and_memory()  # collects

    yield make
    close()


@pytest.fixture
def greedy():
    """greedy(llm, prompts, n) -> token ids, n per prompt, or as many as a list says for each."""
    from vllm import SamplingParams

    def run(llm, prompts, n: int | list[int]) -> list[list[int]]:
        parameters = [
            SamplingParams(temperature=0, max_tokens=most, ignore_eos=True, detokenize=False)
            for most in (n if isinstance(n, list) else [n] * len(prompts))
        ]
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return run


@pytest.fixture
def answers():
    """Greedy tokens with their log-probabilities: `answers` of answers.py."""
    return _beside("answers").answers


@pytest.fixture
def same():
    """Whether two such answers agree: `same` of answers.py."""
    return _beside("answers").same


@pytest.fixture
def plain(engine, greedy, tmp_path_factory):
    """plain(prompts, n) -> greedy tokens of stock vLLM without speculation, n per prompt, in fp32.

    They are the same in whatever batch, so each prompt is decoded once, and the tokens kept for all tests of the run.
    Ends the engine that the test has, if one of the prompts is new.
    """
    run = tmp_path_factory.getbasetemp()
    run = run.parent if "PYTEST_XDIST_WORKER" in os.environ else run  # shared by the workers
    folder = run / "plain-tokens"
    folder.mkdir(exist_ok=True)

    def read(prompt: dict, n: int) -> list[int] | None:
        path = file(prompt)
        tokens = json.loads(path.read_text()) if path.exists() else []
        return tokens[:n] if len(tokens) >= n else None

    def file(prompt: dict) -> Path:
        return folder / f"{hashlib.sha256(json.dumps(prompt).encode()).hexdigest()}.json"

    def tokens(prompts: list[dict], n: int) -> list[list[int]]:
        new = [prompt for prompt in prompts if read(prompt, n) is None]
        for prompt, made in zip(new, greedy(engine(None), new, n) if new else [], strict=True):
            assert len(made) == n
            whole = file(prompt).with_suffix(f".{os.getpid()}")
            whole.write_text(json.dumps(made))
            whole.replace(file(prompt))  # another worker finds nothing or all of it
        return [read(prompt, n) for prompt in prompts]

    return tokens


@pytest.fixture
def counts():
    """counts(llm) -> Counts since the engine started."""
    from specattn_vllm.stats import Counts

    return lambda llm: Counts(**llm.collective_rpc("specattn_stats")[0])


@pytest.fixture
def audit(monkeypatch):
    """Watches slots, selections and page tables of the engines made after it; at teardown none may have been wrong."""
    seen = _beside("selection_audit").Audit()
    seen.watch(monkeypatch)
    yield seen
    assert not seen.violations, seen.violations[:5]


LINE = re.compile(
    r"specattn: (\d+) rounds in \d+ s, acceptance length ([\d.]+), (?:verification|target) read ([\d.]+)% of KV\b.*?"
    r"dense (?:verification )?rows (\d+)"
)


@pytest.fixture(scope="session")
def statistics():
    """statistics(text of a log) -> of each of the plugin's lines: rounds, acceptance length, % read, dense rows."""
    return LINE.findall


@pytest.fixture(scope="module")
def serve(server_class):
    """serve(log, *arguments of scripts/serve, interval=seconds between the plugin's lines in the log) -> the server."""

    def start(log: Path, *arguments: str, interval: float = 5):
        def command(port: int) -> list[str]:
            return [
                str(DEMO.parents[1] / "scripts" / "serve"),
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
                # Two at a time, and the engine of a test beside them, have to fit on one GPU.
                "--gpu-memory-utilization",
                "0.3",
                "--additional-config.specattn.stats_interval_s",
                str(interval),
                *arguments,
            ]

        # The environment that runs this test is the one to serve from.
        return server_class(log, command, SPECATTN_VENV=sys.prefix, VLLM_LOGGING_LEVEL="INFO")

    return start
