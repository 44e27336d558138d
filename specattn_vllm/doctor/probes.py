"""What is asked of processes that load torch and vLLM: `python -m specattn_vllm.doctor.probes NAME FILE ...`.

A probe writes its answer to FILE as JSON: facts, or {"error": what went wrong, its first cause first}.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from specattn_vllm.installed import UserError
from specattn_vllm.tools import engines

SECONDS = 600


def ask(name: str, *arguments: str) -> dict[str, Any]:
    """What a probe answers in a process of its own; {'error': ...} if that dies without an answer or takes too long."""
    with tempfile.TemporaryDirectory(prefix="specattn-doctor-") as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log"
        command = [*engines.MODULE, "specattn_vllm.doctor.probes", name, str(answer), *arguments]
        interrupted, status = engines.run_watched(command, log, os.environ, seconds=SECONDS)
        if answer.is_file():
            return json.loads(answer.read_text())
        if interrupted:
            return {"error": f"no answer within {SECONDS} s"}
        lines = log.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return {"error": f"the process ended with status {status}: {last}"}


def executor(device: str) -> dict[str, Any]:
    """The executor that the default options get."""
    import torch

    from specattn_vllm import executors
    from specattn_vllm.options import SpecAttnOptions

    options = SpecAttnOptions.parse({})
    found = executors.resolve(options.executor, torch.device(device, 0), per_head=options.needs_token_pages)
    return {"executor": found.label or found.name}


def plugin() -> dict[str, Any]:
    """vLLM finds the plugin as a server does. Loading it checks all that it leans on in vLLM."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if "SPECATTN" not in AttentionBackendEnum.__members__:
        return {"error": "vLLM loaded its plugins, and the backend specattn is not among its backends"}
    return {"says": "loaded, vLLM has all parts that it needs, and the backend is registered"}


def config(*serve: str) -> dict[str, Any]:
    """The configuration that `vllm serve` would make, or what it is refused for, and what it would take."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins
    from vllm.usage.usage_lib import UsageContext

    from specattn_vllm import compat

    load_general_plugins()
    model, *rest = serve
    if not any(argument.startswith(("--attention-backend", "--attention-config")) for argument in rest):
        rest += ["--attention-backend", "specattn"]
    parser = compat.serve_parser()
    parser.error = _refused
    made = EngineArgs.from_cli_args(parser.parse_args(["--model", model, *rest])).create_engine_config(
        UsageContext.OPENAI_API_SERVER
    )
    if not compat.is_ours(made):
        chosen = made.attention_config.backend
        named = chosen.name if chosen else "left to vLLM"
        return {
            "error": f"the attention backend is {named}, so the plugin does nothing",
            "remedy": "give --attention-backend specattn in its place",
        }

    from specattn_vllm.doctor.sizes import sizes
    from specattn_vllm.options import SpecAttnOptions

    options = SpecAttnOptions.from_vllm(made)
    spec = made.speculative_config
    drafter = "no drafter" if spec is None else f"drafter: {spec.method}, {spec.num_speculative_tokens} tokens a round"
    says = f"{model} can be served: method {options.method} ({options.kind.guarantee}), {options.amount}, {drafter}"
    return {"says": says, **sizes(made, options)}


def _refused(message: str) -> NoReturn:
    raise UserError(f"vllm serve: {message}")


def generate(target: str, draft: str) -> dict[str, Any]:
    """Eight tokens of the demo pair, by the default method with a draft model."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        target,
        attention_backend="specattn",
        speculative_config={"model": draft, "num_speculative_tokens": 4},
        additional_config={"specattn": {"ratio": 0.25, "min_tokens": 16, "recent_tokens": 8, "crossover_tokens": 0}},
        max_model_len=512,
        max_num_seqs=2,
        gpu_memory_utilization=0.3,
        enforce_eager=True,
        disable_log_stats=True,
    )
    prompt = {"prompt_token_ids": [7 + i % 200 for i in range(200)]}
    parameters = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    tokens = len(llm.generate([prompt], parameters, use_tqdm=False)[0].outputs[0].token_ids)
    [counts] = llm.collective_rpc("specattn_stats")
    if tokens != 8 or not counts or not counts["sparse_rows"]:
        return {"error": f"the demo pair gave {tokens} tokens of 8, and its worker counted {counts}"}
    read = counts["kv_read"] / counts["kv_full"]
    return {"says": f"the demo pair gave 8 tokens, and its worker read {read:.0%} of the KV cache for them"}


def main(name: str, answer: str, *arguments: str) -> None:
    engines.end_with_the_parent()
    try:
        found = {"executor": executor, "plugin": plugin, "config": config, "generate": generate}[name](*arguments)
    except Exception as error:
        from specattn_vllm.causes import summary

        found = {"error": summary(error)}
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
