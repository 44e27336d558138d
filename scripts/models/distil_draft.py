#!/usr/bin/env python3
"""Train a draft model for a target: same vocabulary, a sixth of the size, taught by the target's own next-token logits.

    .venv/bin/python scripts/models/distil_draft.py --out DRAFT             # of the real model; 5 minutes on one GPU
    .venv/bin/python scripts/models/distil_draft.py --out DRAFT --target FOLDER --minutes 10
    scripts/serve --real --draft DRAFT

The text is found on the machine (real_text.py); one file of twenty, by the hash of its content, is never
trained on, and the draft is judged on those. A part of the text is made into chats (real_chats.py), so that the
draft knows the target's chat template. The seed fixes the text, its order and the start. How many steps fit into the
minutes depends on the machine: with --steps the same machine makes the same draft again (on a GPU, up to the order in
which it adds).
"""

import argparse
import json
import platform
import shutil
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there by itself under PYTHONSAFEPATH=1
from demo_evaluation import LOOKAHEAD, evaluate
from distil_data import read, separator_of
from distil_training import draft_config, principal, train
from real_model import default_folder
from train_demo_pair import save_model

TINY = dict(
    context=128,
    batch=2,
    hidden=32,
    layers=1,
    heads=1,
    intermediate=64,
    warmup=2,
    eval_windows=2,
    steps=12,
    corpus_mb=0.5,
    rows=64,
)
A_STEP = f"expected_tokens_per_step_k{LOOKAHEAD}"
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [speculative-decoding]
---
# Draft model for {target}

It drafts for {target} in speculative decoding and shares its tokenizer; on its own it writes nothing of use.

- Architecture: LlamaForCausalLM, {layers} layers, hidden {hidden}, {heads} heads of {head_dim}, tied embeddings that
  started from the target's, on their first {hidden} principal directions; {parameters:,} parameters, bfloat16.
- Data: text of {packages} packages and manuals installed on the machine that trained it, {stream:.1f}M tokens, each
  under its own licence (names in `training.json`); {chat_share:.0%} of it made into chats by rule. One file of twenty,
  by the hash of its content, was held out.
- Training: KL to the target's next-token distribution, {steps} steps of {batch} x {context} tokens ({seen:.1f}M in
  all), AdamW, learning rate {lr:g} falling to 0, {seconds:.0f} s on {device}.

## On held-out text

| | target, nats a token | draft | same most likely token | tokens a step |
| --- | --- | --- | --- | --- |
{rows}

Tokens a step: with {lookahead} greedy draft tokens, on the given text rather than on the target's own (an estimate).
"""


def write_card(folder: Path, config: LlamaConfig, record: dict):
    run, data = record["training"], record["data"]
    rows = "\n".join(
        f"| {kind} | {e['target_loss']} | {e['draft_loss']} | {e['agreement']:.1%} | {e[A_STEP]} |"
        for kind, e in record["evaluation"].items()
    )
    (folder / "README.md").write_text(
        CARD.format(
            target=record["target"],
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            lookahead=LOOKAHEAD,
            heads=config.num_attention_heads,
            head_dim=config.head_dim,
            parameters=run["parameters"],
            rows=rows,
            packages=len(data["packages"]),
            stream=data["training_tokens"] / 1e6,
            chat_share=record["chat_share"],
            steps=run["steps"],
            batch=run["batch"],
            context=run["context"],
            seen=run["tokens"] / 1e6,
            lr=run["learning_rate"],
            seconds=run["seconds"],
            device=record["device"],
        )
    )
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help="the draft; absent or empty")
    add("--target", type=Path, default=default_folder(), metavar="FOLDER", help="[%(default)s]")
    add("--roots", type=Path, nargs="+", metavar="FOLDER", help="where to look for text [Python's packages, manuals]")
    add("--minutes", type=float, default=5.0, help="of training; reading and judging come on top [%(default)s]")
    add("--steps", type=int, default=0, help="so many steps, whatever time they take, in place of --minutes")
    add("--corpus-mb", type=float, default=220, help="of text at most, 10^6 characters [%(default)s]")
    add("--chat-share", type=float, default=0.1, help="of the text that is made into chats [%(default)s]")
    add("--learning-rate", type=float, default=1e-3, help="[%(default)s]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[%(default)s]")
    add("--tiny", action="store_true", help="sizes for a test on a CPU")
    sizes = dict(
        batch=8,
        context=4096,
        layers=6,
        hidden=320,
        heads=5,
        head_dim=64,
        intermediate=896,
        warmup=50,
        rows=4096,
        eval_windows=8,
        seed=0,
    )
    for name, value in sizes.items():
        add("--" + name.replace("_", "-"), type=int, default=value, help="[%(default)s]")
    if "--tiny" in argv:
        parser.set_defaults(**TINY)
    args = parser.parse_args(argv)
    if not (args.target / "config.json").is_file():
        parser.error(f"--target {args.target} holds no model: run scripts/real_model, or name a folder")
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"--out {args.out} is not empty: name another folder, or remove it")
    return args


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cpu" and not args.tiny:
        print("no GPU: the minutes are the same and the steps few; a draft of use takes hours here", flush=True)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    transformers.utils.logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(args.target, local_files_only=True)
    first = separator_of(tokenizer)
    tokens, held, facts = read(args, tokenizer)
    stream = torch.from_numpy(tokens.astype("int32")).to(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # CPUs may emulate bfloat16, many times slower
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=dtype).to(device).eval()
    config = draft_config(target.config, args)
    draft = LlamaForCausalLM(config).float()
    with torch.no_grad():
        draft.model.embed_tokens.weight.copy_(principal(target.model.embed_tokens.weight, args.hidden))
    run = train(draft.to(device).train(), target, stream, first, args)

    args.out.mkdir(parents=True, exist_ok=True)
    save_model(draft, args.out)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # byte for byte the target's
        shutil.copyfile(args.target / name, args.out / name)
    saved = AutoModelForCausalLM.from_pretrained(args.out, dtype=dtype)  # what vLLM will load
    evaluation = {
        kind: evaluate(target, saved, judged, args, device, text=f"{kind}, held out", first=first)
        for kind, judged in held.items()
    }
    record = {
        "target": args.target.resolve().name,
        "argv": argv,
        "seed": args.seed,
        "chat_share": args.chat_share,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "training": run,
        "evaluation": evaluation,
        "data": facts,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    write_card(args.out, config, record)
    for kind, found in evaluation.items():
        print(f"held-out {kind}: same most likely token {found['agreement']:.1%}, {found[A_STEP]} tokens a step")
    print(args.out)


if __name__ == "__main__":
    main()
