"""An engine that really lacks memory for our buffers: its address space is limited (RLIMIT_AS), and it asks for room
for 20,000 requests."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        shutil.which("nvidia-smi") is not None, reason="CUDA takes more of the address space than it uses"
    ),
]

ROOT = Path(__file__).parents[2]
REQUESTS, LONGEST = 20_000, 8192
# As much as vLLM itself takes for so many requests, and more; but not what ours take. Set after the imports, of which
# nobody knows how much of the address space they take.
ENGINE = f"""
import resource, sys
import vllm.v1.worker.gpu.model_runner
from vllm import LLM
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 3 * 2**30,) * 2)
draft = {{"method": "draft_model", "model": sys.argv[3], "num_speculative_tokens": 4}}
LLM(
    sys.argv[2], dtype="float32", enforce_eager=True, max_model_len={LONGEST}, max_num_seqs={REQUESTS},
    max_num_batched_tokens={REQUESTS}, num_gpu_blocks_override=128, distributed_executor_backend="uni",
    attention_backend="specattn", additional_config={{"specattn": {{"method": sys.argv[1]}}}},
    speculative_config=draft if sys.argv[3] else None,
)
"""


@pytest.mark.parametrize("method", ["specattn", pytest.param("vegas", marks=pytest.mark.long)])
def test_an_engine_without_the_memory_says_what_does_not_fit_and_ends(method, demo_pair):
    target, draft = demo_pair
    command = [sys.executable, "-P", "-c", ENGINE, method, target, target if method == "vegas" else draft]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            said, _ = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail("it neither starts nor ends")
    assert process.returncode == 1
    [error] = {line.partition("ValueError: ")[2] for line in said.splitlines() if "ValueError: specattn" in line}
    needs = re.match(r"specattn needs (\d+\.\d) GiB \((.*?)\) for max_num_seqs = 20000 requests", error)
    assert needs and float(needs[1]) > 4, error
    parts = dict(re.findall(r"(\w[\w ]*) ([\d.]+) MiB", needs[2]))
    assert sum(map(float, parts.values())) / 1024 == pytest.approx(float(needs[1]), abs=0.06)
    assert float(parts["scores"]) > 1024  # float32 on a CPU, also where they are only measured
    assert f"max_model_len = {LONGEST}" in error
    assert "the allocation failed: lower --max-num-seqs or --max-model-len" in error
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nobody is left


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_server_without_the_memory_says_so_and_ends(server_class, tmp_path):
    """With its worker in a process of its own. 9 GB of address space are enough for vLLM, and not for our buffers."""

    def command(port: int) -> list[str]:
        size = ["--max-num-seqs", str(REQUESTS), "--max-num-batched-tokens", str(REQUESTS)]
        size += ["--additional-config.specattn.method", "specattn"]  # whose buffers are large
        served = [str(ROOT / "scripts/serve"), "--host", "127.0.0.1", "--port", str(port), *size]
        return ["bash", "-c", 'ulimit -v 9000000 && exec "$@"', "limited", *served]

    with server_class(tmp_path / "log", command, SPECATTN_VENV=sys.prefix) as server:
        assert server.process.wait(600) == 1
        assert "specattn needs" in server.text() and "lower --max-num-seqs or --max-model-len" in server.text()
        deadline = time.monotonic() + 20
        with pytest.raises(ProcessLookupError):  # nobody of its group is left
            while time.monotonic() < deadline:
                os.killpg(server.process.pid, 0)
                time.sleep(0.2)
