"""Two ranks on one machine, each with half of the heads, in processes of their own as vLLM starts them: on a CPU with
two cores, or on two GPUs, there with CUDA graphs too."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two processor cores"),
    pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks need two GPUs, or none"),
]

ON_GPUS = torch.cuda.device_count() > 1
# Others may use the GPUs too: neither profile their memory nor ask for most of it.
ARGUMENTS = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30} if ON_GPUS else {}
graphs = pytest.param(
    False, id="graphs", marks=[pytest.mark.gpu, pytest.mark.skipif(not ON_GPUS, reason="graphs need NVIDIA GPUs")]
)
eager = pytest.mark.parametrize("eager", [pytest.param(True, id="eager"), graphs])

# A rank of the demo target holds one of its two KV heads.
PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    target, draft, options, prompts, arguments = json.loads(sys.argv[1])
    llm = LLM(
        target, dtype="float32", max_model_len=1024, max_num_seqs=2, tensor_parallel_size=2,
        attention_backend="specattn", additional_config={"specattn": options}, **arguments,
        speculative_config={"model": draft, "method": "draft_model", "num_speculative_tokens": 3},
    )
    parameters = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    outputs = llm.generate(prompts, parameters, use_tqdm=False)
    result = [[list(o.outputs[0].token_ids) for o in outputs], llm.collective_rpc("specattn_stats")]
    print("RESULT", json.dumps(result), flush=True)
    llm.llm_engine.engine_core.shutdown()
"""


def run_on_two_ranks(
    tmp_path, pair, options: dict, prompts: list[dict], eager: bool
) -> tuple[list[list[int]], list[dict]]:
    script = tmp_path / "ranks.py"
    script.write_text(PROGRAM)
    # No process for the engine's core, which would import everything once more: those of the ranks are what matters.
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    asked = [*pair, options, prompts, ARGUMENTS | {"enforce_eager": eager}]
    command = [sys.executable, "-P", str(script), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    lines = [line.split("RESULT ", 1)[1] for line in done.stdout.splitlines() if "RESULT " in line]
    assert lines, done.stdout[-2000:] + done.stderr[-2000:]
    return tuple(json.loads(lines[0]))


@eager
def test_two_ranks_give_the_tokens_of_one(eager, plain, prompts, demo_pair, tmp_path):
    # Lengths after which no two tokens are nearly as likely. After 300, two are 0.003 nats apart, and the order in
    # which two ranks add up decides between them.
    asked = prompts([310, 600])
    expected = plain(asked, 16)
    tokens, ranks = run_on_two_ranks(tmp_path, demo_pair, {"method": "specattn", "top_p": 1.0}, asked, eager)
    assert tokens == expected
    assert len(ranks) == 2
    for counts in ranks:
        assert counts["sparse_rows"] == counts["verify_rows"] > 0
        assert counts["kv_read"] == counts["kv_full"]


@eager
@pytest.mark.parametrize(
    "options",
    # A map of heads by proportion stays within each rank.
    [
        pytest.param({"method": "specattn", "top_p": 0.7}, marks=pytest.mark.long),
        {"method": "sts", "ratio": 0.2, "layer_map": "uniform"},
        {"method": "sketch", "ratio": 0.2},
    ],
    ids=["specattn", "sts", "sketch"],
)
def test_each_rank_prunes(options, eager, prompts, demo_pair, tmp_path):
    options = {**options, "min_tokens": 16}
    tokens, ranks = run_on_two_ranks(tmp_path, demo_pair, options, prompts([600, 900]), eager)
    assert all(len(row) == 16 for row in tokens)
    for counts in ranks:
        assert counts["sparse_rows"] == counts["verify_rows"] > 0
        assert counts["kv_read"] < 0.8 * counts["kv_full"]
