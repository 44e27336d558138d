"""A sparse engine in this process that samples text after documents (guarantee.py, audit_error.py)."""

import argparse
import os
from typing import Any

import given
from refusal import Refused

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # its layers are watched


def add_arguments(parser: argparse.ArgumentParser, steps: int) -> None:
    add = parser.add_argument
    given.add_model_and_texts(parser)
    add("--context", type=int, default=3000, metavar="N", help="tokens of each prompt [%(default)s]")
    add("--steps", type=int, default=steps, metavar="N", help="tokens sampled after each [%(default)s]")
    add("--ratio", type=float, default=0.125, metavar="R", help="share of the context that is read [%(default)s]")
    add("--dtype", default="float32", help="of weights and KV cache [%(default)s]")
    add("--gpu-memory-utilization", type=float, default=0.9, metavar="SHARE", help="as of vLLM [%(default)g]")


def setup(args: argparse.Namespace) -> dict[str, Any]:
    if (wanted := args.context + args.steps + 8) > (there := given.positions(args.target)):
        raise Refused(f"{wanted} positions for --context and --steps, and the model has {there}: lower one")
    found = {name: getattr(args, name) for name in ("context", "steps", "ratio", "dtype")} | {"prefix_caching": False}
    return found | {"documents": [f"{path.parent.name}/{path.name}" for path in args.text]}


def sampled(args: argparse.Namespace, options: dict[str, Any]):
    """The engine, after it has sampled."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(args.target),
        attention_backend="specattn",
        additional_config={"specattn": options},
        dtype=args.dtype,
        enforce_eager=True,
        max_model_len=args.context + args.steps + 8,
        max_num_seqs=len(args.text),
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
        gpu_memory_utilization=args.gpu_memory_utilization,
    )
    tokenizer = llm.get_tokenizer()
    prompts = [tokenizer(path.read_text(), add_special_tokens=False).input_ids[: args.context] for path in args.text]
    short = [path.name for path, prompt in zip(args.text, prompts, strict=True) if len(prompt) < args.context]
    if short:
        raise Refused(f"fewer than {args.context} tokens in {', '.join(short)}: leave them out, or lower --context")
    sampling = [
        SamplingParams(temperature=1.0, seed=n, max_tokens=args.steps, ignore_eos=True) for n in range(len(prompts))
    ]
    llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return llm
