"""Engines in this process, real held-out code as prompts, and an audit of every selection that is read."""

from __future__ import annotations

import gc
import os
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

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


@pytest.fixture
def engine(demo_pair):
    """engine(options, **vllm_arguments) -> LLM; options None is stock vLLM without speculation."""
    import torch
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    made = []

    def make(
        options: dict | None = None,
        *,
        num_speculative_tokens: int = 4,
        target: str | None = None,
        draft: str | None = None,
        **arguments,
    ):
        close()
        arguments = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 4608,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 1024,
            "distributed_executor_backend": "uni",
            "gpu_memory_utilization": 0.3,
            **arguments,
        }
        if options is not None:
            arguments["attention_backend"] = "specattn"
            arguments["additional_config"] = {"specattn": options}
            arguments["speculative_config"] = {
                "method": "draft_model",
                "model": draft or demo_pair[1],
                "num_speculative_tokens": num_speculative_tokens,
            }
        torch.manual_seed(0)
        made.append(LLM(target or demo_pair[0], **arguments))
        return made[-1]

    def close():
        while made:
            made.pop().llm_engine.engine_core.shutdown()
            gc.collect()
            cleanup_dist_env_and_memory()

    yield make
    close()


@pytest.fixture
def greedy():
    """greedy(llm, prompts, n) -> token ids, n per prompt."""
    from vllm import SamplingParams

    def run(llm, prompts, n: int) -> list[list[int]]:
        parameters = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return run


@pytest.fixture
def counts():
    """counts(llm) -> Counts since the engine started."""
    from specattn_vllm.stats import Counts

    return lambda llm: Counts(**llm.collective_rpc("specattn_stats")[0])


@dataclass
class Audit:
    """What every pruned row read, checked against who the selection was made for."""

    owner: dict[int, str] = field(default_factory=dict)
    """slot -> request that holds it now."""
    made_for: dict[int, tuple[str, int]] = field(default_factory=dict)
    """slot -> (request, context length) of the selection stored there."""
    sparse_rows: dict[str, int] = field(default_factory=dict)
    dense_rows: dict[str, int] = field(default_factory=dict)
    preemptions: int = 0
    violations: list[str] = field(default_factory=list)


@pytest.fixture
def audit(monkeypatch) -> Audit:
    """Watches slots, selections and page tables of the engines made after it; at teardown none may have been wrong."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker.gpu.states import RequestState

    from specattn_vllm.selection.pruner import Pruner
    from specattn_vllm.selection.store import SelectionStore

    seen = Audit()
    add_request, put, prune = RequestState.add_request, SelectionStore.put, Pruner.prune
    preempt = Scheduler._preempt_request

    def watch_add(self, req_id, *args, **kwargs):
        result = add_request(self, req_id, *args, **kwargs)
        seen.owner[self.req_id_to_index[req_id]] = req_id
        return result

    def watch_put(self, slots, bits, prefix_lens):
        for slot, length in zip(slots.tolist(), prefix_lens.tolist(), strict=True):
            seen.made_for[slot] = (seen.owner[slot], length)
        return put(self, slots, bits, prefix_lens)

    def watch_prune(self, *, slots, is_prefilling, query_start_loc, seq_lens, **kwargs):
        plan = prune(
            self,
            slots=slots,
            is_prefilling=is_prefilling,
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            **kwargs,
        )
        lengths = (query_start_loc[1:] - query_start_loc[:-1]).tolist()
        for row in range(plan.num_rows if plan is not None else 0):
            slot, total = int(slots[row]), int(seq_lens[row])
            request = seen.owner[slot]
            if bool((plan.kept[:, row] == total).all()):
                seen.dense_rows[request] = seen.dense_rows.get(request, 0) + 1
                continue
            seen.sparse_rows[request] = seen.sparse_rows.get(request, 0) + 1
            if seen.made_for.get(slot) != (request, total - lengths[row]):
                seen.violations.append(
                    f"{request} in slot {slot} with {total - lengths[row]} computed tokens read the selection of "
                    f"{seen.made_for.get(slot)}"
                )
        return plan

    def watch_preempt(self, *args, **kwargs):
        seen.preemptions += 1
        return preempt(self, *args, **kwargs)

    monkeypatch.setattr(RequestState, "add_request", watch_add)
    monkeypatch.setattr(SelectionStore, "put", watch_put)
    monkeypatch.setattr(Pruner, "prune", watch_prune)
    monkeypatch.setattr(Scheduler, "_preempt_request", watch_preempt)
    yield seen
    assert not seen.violations, seen.violations[:5]
