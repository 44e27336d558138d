#!/usr/bin/env python3
"""Train the demo pair: a small target and a smaller draft, both Llama, on the Python source of installed packages.

    python3 scripts/models/train_demo_pair.py --out DIR                      # corpus, target, draft, evaluation, cards
    python3 scripts/models/train_demo_pair.py --out DIR --seconds-draft 0    # the target alone ...
    python3 scripts/models/train_demo_pair.py --out DIR --target DIR/target  # ... and the draft in a second call

The Python standard library, and every package whose name hashes into one part of twenty, are held out of training;
the evaluation reads the standard library only. Both models share tokenizer, KV heads and head size, so that one
KV-cache layout serves both. DIR/target is complete before the draft starts: a cut-off loses the draft at most.
"""

import argparse
import json
import platform
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there by itself under PYTHONSAFEPATH=1
from demo_corpus import collect_corpus, encode, site_dirs, train_tokenizer, write_tokenizer
from demo_evaluation import evaluate, write_card
from demo_training import train
from refusal import Refused

TINY = dict(
    vocab=512,
    context=128,
    batch=4,
    steps_target=60,
    steps_draft=30,
    target_layers=2,
    target_hidden=64,
    target_intermediate=128,
    draft_layers=1,
    draft_hidden=32,
    draft_intermediate=64,
    warmup=5,
    eval_windows=8,
    site_packages=False,
    seconds_target=60,
    seconds_draft=60,
    report_every=1.0,
)


# ---- models and training --------------------------------------------------------------------------------------


def make_config(args, kind, tokenizer):
    return LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=getattr(args, f"{kind}_hidden"),
        intermediate_size=getattr(args, f"{kind}_intermediate"),
        num_hidden_layers=getattr(args, f"{kind}_layers"),
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=args.context,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def megabytes(config):
    with torch.device("meta"):
        return 2 * sum(p.numel() for p in LlamaForCausalLM(config).parameters()) / 1e6


def save_model(model, folder):
    """bf16 weights; through a fresh model, so that nothing of the compiled and fp32 one reaches the folder."""
    out = LlamaForCausalLM(model.config).to(torch.bfloat16)
    out.load_state_dict(model.state_dict())
    out.generation_config = GenerationConfig(bos_token_id=out.config.bos_token_id, eos_token_id=out.config.eos_token_id)
    out.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written for the owner alone, which a package must not be


# ---- command line ---------------------------------------------------------------------------------------------


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for target/ and draft/")
    add("--target", type=Path, help="a trained target folder: skip its training, train the draft alone")
    add("--corpus", type=Path, nargs="*", default=[], help="more directories whose children are packages")
    add("--site-packages", action=argparse.BooleanOptionalAction, default=True, help="read the installed packages")
    add("--seconds-target", type=float, default=260)
    add("--seconds-draft", type=float, default=150, help="0 trains the target alone")
    add("--seconds-total", type=float, help="shrink both times so that the whole run ends within this")
    add("--steps-target", type=int, default=1_000_000)
    add("--steps-draft", type=int, default=1_000_000)
    add("--lr-target", type=float, default=2e-3)
    add("--lr-draft", type=float, default=4e-3)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="auto: on for CUDA")
    add("--tiny", action="store_true", help="sizes for a test on a CPU, with --corpus alone")
    add("--report-every", type=float, default=20.0, help="seconds between progress lines")
    sizes = dict(
        batch=8,
        context=8192,
        vocab=4096,
        target_layers=6,
        target_hidden=320,
        target_intermediate=576,
        draft_layers=3,
        draft_hidden=144,
        draft_intermediate=320,
        heads=4,
        kv_heads=2,
        head_dim=64,
        warmup=100,
        eval_windows=40,
        corpus_mb=600,
        seed=0,
    )
    for name, value in sizes.items():
        add("--" + name.replace("_", "-"), type=int, default=value)
    add("--max-mb", type=float, default=15.5, help="refuse a pair whose bf16 weights take more (10^6 bytes)")
    if "--tiny" in argv:
        parser.set_defaults(**TINY)
    args = parser.parse_args(argv)
    if args.vocab > 32767:
        parser.error("--vocab: at most 32767 (tokens are held as int16 on the device)")
    return args


def main(argv=None):
    began = time.monotonic()
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    transformers.utils.logging.disable_progress_bar()  # bars between the progress lines make a log unreadable
    folders = {kind: args.out / kind for kind in ("target", "draft")}

    roots = [*args.corpus, *(site_dirs() if args.site_packages else [])]
    training, held, facts = collect_corpus(roots, args.seed, args.corpus_mb)
    print(
        f"corpus: {facts['files']} files of {facts['packages']} packages, {facts['characters'] / 1e6:.0f} MB, "
        f"dropped {facts['dropped_files']}, {time.monotonic() - began:.0f} s",
        flush=True,
    )
    if not training:
        raise Refused("no training text found: give --corpus DIR, or run where packages are installed")
    if args.target:
        tokenizer = AutoTokenizer.from_pretrained(args.target, local_files_only=True)
    else:
        tokenizer = train_tokenizer(training, args.vocab, args.context, args.seed)
    configs = {kind: make_config(args, kind, tokenizer) for kind in folders}
    if args.target:
        configs["target"] = LlamaConfig.from_pretrained(args.target)
        configs["draft"].vocab_size = configs["target"].vocab_size
    mb = {kind: megabytes(c) for kind, c in configs.items()}
    print(f"weights: target {mb['target']:.2f} MB, draft {mb['draft']:.2f} MB", flush=True)
    if sum(mb.values()) > args.max_mb:
        raise Refused(f"the pair takes {sum(mb.values()):.2f} MB, more than --max-mb {args.max_mb}")
    if args.target and args.target.resolve() != folders["target"].resolve():
        shutil.copytree(args.target, folders["target"], dirs_exist_ok=True)
    for kind in folders if not args.target else ("draft",):
        write_tokenizer(tokenizer, configs[kind], folders[kind])
    for name in ("tokenizer.json", "tokenizer_config.json"):  # byte for byte the same, also after a reload
        shutil.copyfile(folders["target"] / name, folders["draft"] / name)
    held_stream = encode(tokenizer, held, "held-out text")
    tokens = encode(tokenizer, training, "training text")
    stream = torch.from_numpy(tokens.astype(np.int16)).to(device)

    budget = {"target": 0.0 if args.target else args.seconds_target, "draft": args.seconds_draft}
    if args.seconds_total:  # 45 s stay for saving, loading and the evaluation
        left = args.seconds_total - (time.monotonic() - began) - 45
        scale = min(1.0, left / max(sum(budget.values()), 1e-9))
        if scale <= 0:
            raise Refused("no time left to train within --seconds-total")
        budget = {kind: s * scale for kind, s in budget.items()}
        print(f"training times { ({k: round(s) for k, s in budget.items()}) } s", flush=True)
    common = {
        "data": {**facts, "training_tokens": len(tokens), "held_out_tokens": len(held_stream)},
        "argv": argv,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "seed": args.seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    records = {}
    for kind in [k for k in folders if budget[k] > 0]:
        teacher = None
        if kind == "draft":  # the published bf16 target teaches, not the fp32 one: it is what the draft will meet
            teacher = AutoModelForCausalLM.from_pretrained(folders["target"], dtype=torch.bfloat16).to(device).eval()
        model = LlamaForCausalLM(configs[kind]).float()
        run = train(
            kind,
            model,
            stream,
            args,
            budget[kind],
            getattr(args, f"steps_{kind}"),
            getattr(args, f"lr_{kind}"),
            teacher,
        )
        save_model(model, folders[kind])
        records[kind] = {**common, "kind": kind, "megabytes": round(mb[kind], 2), "training": run}
        write_card(folders[kind], kind, records[kind])
        print(f"{kind}: saved after {run['steps']} steps, {time.monotonic() - began:.0f} s in all", flush=True)
        del model, teacher
    pair = [
        AutoModelForCausalLM.from_pretrained(folders[k], dtype=torch.bfloat16)
        if k == "target" or budget["draft"] > 0
        else None
        for k in folders
    ]
    evaluation = evaluate(*pair, held_stream, args, device)
    if "target" not in records and (folders["target"] / "training.json").exists():
        records["target"] = json.loads((folders["target"] / "training.json").read_text())
    for kind, record in records.items():
        record["evaluation"] = evaluation
        write_card(folders[kind], kind, record)
    print(json.dumps(evaluation, indent=1))
    print(f"done in {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
