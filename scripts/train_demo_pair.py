#!/usr/bin/env python3
"""Train the demo pair: a small target and a smaller draft, both Llama, on the Python source of installed packages.

    python3 scripts/train_demo_pair.py --out DIR                      # corpus, target, draft, evaluation, cards
    python3 scripts/train_demo_pair.py --out DIR --seconds-draft 0    # the target alone ...
    python3 scripts/train_demo_pair.py --out DIR --target DIR/target  # ... and the draft in a second call

The Python standard library, and every package whose name hashes into one part of twenty, are held out of training;
the evaluation reads the standard library only. Both models share tokenizer, KV heads and head size, so that one
KV-cache layout serves both. DIR/target is complete before the draft starts: a cut-off loses the draft at most.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import site
import sys
import sysconfig
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

BOS, EOS = "<|bos|>", "<|eos|>"
EDGES = (0, 512, 1024, 2048, 4096, 8192)  # position buckets of the evaluation, in tokens
LOOKAHEAD = 4  # draft tokens a step, for the acceptance estimate
SKIP_DIRS = {"__pycache__", "site-packages", "dist-packages", "node_modules"}
TEST_DIRS = {"test", "tests", "idle_test"}
TINY = dict(vocab=512, context=128, batch=4, steps_target=60, steps_draft=30, target_layers=2, target_hidden=64,
            target_intermediate=128, draft_layers=1, draft_hidden=32, draft_intermediate=64, warmup=5,
            eval_windows=8, site_packages=False, tokenize_seconds=1, seconds_target=60, seconds_draft=60,
            report_every=1.0)


# ---- corpus ---------------------------------------------------------------------------------------------------


def python_files(root):
    """Every *.py under `root` in path order, without caches and nested package trees."""
    for folder, dirs, names in os.walk(root):
        dirs[:] = sorted(d for d in dirs if d not in SKIP_DIRS)
        yield from (Path(folder, n) for n in sorted(names) if n.endswith(".py"))


def read_source(path):
    """The text of a file of 1 KB to 400 KB in valid UTF-8 with lines of ordinary length; None for anything else."""
    try:
        if not 1_000 <= path.stat().st_size <= 400_000:
            return None
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return None
    # Very long lines mark tables and generated parsers, which teach a small model nothing.
    return None if len(text) / (text.count("\n") + 1) > 200 else text


def is_held_out_package(name):
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0


def digest(text):
    return hashlib.sha256(text.encode()).digest()


def long_lines(text):
    return [s for line in text.splitlines() if len(s := line.strip()) >= 20]


def site_dirs():
    paths = [*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    return [Path(p) for p in dict.fromkeys(map(os.path.realpath, paths)) if os.path.isdir(p)]


def collect_corpus(roots, seed=0, max_mb=600):
    """Training and held-out text.

    roots: directories whose children are packages (or single modules).
    Returns (training, held_out, facts). The first two are lists of documents; a document is the list of the files of
    one package directory in path order, each text headed by its path inside the package. Directories of one package
    follow each other, so that an 8k context holds related files and copying over long distances pays.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    names = {}  # top-level package name -> [(path, path inside the root)]
    for root in map(Path, roots):
        for path in python_files(root):
            rel = path.relative_to(root)
            names.setdefault(rel.parts[0].removesuffix(".py"), []).append((path, rel))
    order = sorted(names)
    random.Random(seed).shuffle(order)  # a cap on the text must not favour the start of the alphabet
    library = [(p, p.relative_to(stdlib)) for p in python_files(stdlib)]
    held_packages = [n for n in order if is_held_out_package(n)]

    with ThreadPoolExecutor(16) as pool:

        def texts(files):
            return [(rel, t) for (_, rel), t in zip(files, pool.map(read_source, (p for p, _ in files)), strict=True)
                    if t is not None]

        library_texts = texts(library)
        barred = {digest(t) for _, t in library_texts}
        library_lines = {line for _, t in library_texts for line in long_lines(t)}
        for name in held_packages:
            barred.update(digest(t) for _, t in texts(names[name]))

        training, used, seen, size = [], [], set(barred), 0
        dropped = {"same_as_held_out": 0, "mostly_standard_library": 0, "duplicate": 0}
        for name in (n for n in order if n not in set(held_packages)):
            folders = {}
            for rel, text in texts(names[name]):
                key = digest(text)
                if key in seen:
                    dropped["same_as_held_out" if key in barred else "duplicate"] += 1
                    continue
                # Packages carry edited copies of standard modules (back-ports), which no content hash finds.
                lines = long_lines(text)
                if lines and sum(line in library_lines for line in lines) > len(lines) / 2:
                    dropped["mostly_standard_library"] += 1
                    continue
                seen.add(key)
                size += len(text)
                folders.setdefault(rel.parent, []).append(f"# file: {rel.as_posix()}\n{text.rstrip()}\n\n")
            if folders:
                used.append(name)
                training.extend(folders.values())
            if size > max_mb * 1e6:
                break
    held = {}
    for rel, text in library_texts:
        if not TEST_DIRS & set(rel.parts):
            held.setdefault(rel.parent, []).append(f"# file: {rel.as_posix()}\n{text.rstrip()}\n\n")
    facts = {"packages": len(used), "package_names": sorted(used), "held_out_packages": sorted(held_packages),
             "files": sum(map(len, training)), "characters": size, "dropped_files": dropped,
             "held_out_files": sum(map(len, held.values()))}
    return training, list(held.values()), facts


# ---- tokenizer ------------------------------------------------------------------------------------------------


def train_tokenizer(documents, vocab, context, seed, sample_mb=60):
    """A byte-level BPE tokenizer that puts <|bos|> first, as every training context does."""
    files = [f for d in documents for f in d]
    random.Random(seed).shuffle(files)
    total, sample = 0, []
    for text in files:
        if (total := total + len(text)) > sample_mb * 1e6:
            break
        sample.append(text)
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(sample, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[BOS, EOS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if tok.get_vocab_size() != vocab:
        raise SystemExit(f"the text gives {tok.get_vocab_size()} tokens, not {vocab}: more text or a smaller --vocab")
    tok.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tok.token_to_id(BOS))])
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token=BOS, eos_token=EOS, model_max_length=context)
    # Not a chat model; the template only lets a chat endpoint answer with a continuation.
    fast.chat_template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return fast


def encode(tokenizer, documents, seconds, label):
    """One uint16 stream of <|bos|> document <|eos|> ...; stops, and says so, once `seconds` are over."""
    bos, eos, tok = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.backend_tokenizer
    flat = [(t, i == 0, i == len(d) - 1) for d in documents for i, t in enumerate(d)]
    parts, start = [], time.monotonic()
    for at in range(0, len(flat), 1024):  # bounded batches: an Encoding takes far more memory than its ids
        if time.monotonic() - start > seconds:
            print(f"{label}: TIME OVER, {at} of {len(flat)} files tokenised", flush=True)
            break
        chunk = flat[at : at + 1024]
        found = tok.encode_batch_fast([t for t, _, _ in chunk], add_special_tokens=False)
        for (_, first, last), e in zip(chunk, found, strict=True):
            parts.append(np.array([bos] * first + e.ids + [eos] * last, dtype=np.uint16))
    stream = np.concatenate(parts)
    print(f"{label}: {len(stream) / 1e6:.1f}M tokens in {time.monotonic() - start:.0f} s", flush=True)
    return stream


def write_tokenizer(tokenizer, config, folder):
    """Save tokenizer and config, and read them back: a tokenizer that loads differently must stop the run now."""
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    probe = "def f(x):\n    return {'a': [x, 1.5]}  # caf\u00e9\n"
    again = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = again(probe)["input_ids"]
    if ids != tokenizer(probe)["input_ids"] or again.decode(ids[1:]) != probe or ids[0] != config.bos_token_id:
        raise SystemExit(f"the tokenizer in {folder} does not load as it was saved")


# ---- models and training --------------------------------------------------------------------------------------


def make_config(args, kind, tokenizer):
    return LlamaConfig(
        vocab_size=args.vocab, hidden_size=getattr(args, f"{kind}_hidden"),
        intermediate_size=getattr(args, f"{kind}_intermediate"), num_hidden_layers=getattr(args, f"{kind}_layers"),
        num_attention_heads=args.heads, num_key_value_heads=args.kv_heads, head_dim=args.head_dim,
        max_position_embeddings=args.context, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, architectures=["LlamaForCausalLM"], dtype="bfloat16")


def megabytes(config):
    with torch.device("meta"):
        return 2 * sum(p.numel() for p in LlamaForCausalLM(config).parameters()) / 1e6


def batches(stream, batch, context, bos, seed):
    """Endless (x, y), each [batch, context]: x is <|bos|> and the text one token behind y; a new phase each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        phase = int(torch.randint(context, (1,), generator=generator))
        count = (len(stream) - phase) // context
        if count < batch:
            raise SystemExit(f"{len(stream)} training tokens do not fill a batch of {batch} x {context}")
        starts = phase + torch.randperm(count, generator=generator) * context
        for part in starts.split(batch):
            if len(part) == batch:
                index = part.to(stream.device)[:, None] + torch.arange(context, device=stream.device)
                y = stream[index].long()
                yield F.pad(y[:, :-1], (1, 0), value=bos), y


def losses(logits, y, teacher):
    """(loss to minimise, cross entropy on the text), nats a token; with a teacher, half of each loss is its KL."""
    logits = logits.float().flatten(0, 1)
    ce = F.cross_entropy(logits, y.flatten())
    if teacher is None:
        return ce, ce
    wanted = F.log_softmax(teacher.float().flatten(0, 1), -1)
    kl = F.kl_div(F.log_softmax(logits, -1), wanted, log_target=True, reduction="batchmean")
    return 0.5 * ce + 0.5 * kl, ce


def train(kind, model, stream, args, seconds, steps, lr, teacher=None):
    """Train `model` in place until `seconds` (compilation counted) or `steps` are over; returns a record."""
    start, device = time.monotonic(), stream.device
    model.to(device).train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    data = batches(stream, args.batch, args.context, model.config.bos_token_id, args.seed + (teacher is not None))
    loss_of = losses

    def backward(x, y):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            hint = None
            if teacher is not None:
                with torch.no_grad():
                    hint = teacher(input_ids=x, use_cache=False).logits
            logits = model(input_ids=x, use_cache=False).logits
        loss, ce = loss_of(logits, y, hint)
        loss.backward()
        return ce.detach()

    compiled = args.compile == "on" or (args.compile == "auto" and device.type == "cuda")
    if compiled:  # layer by layer: one layer's graph serves all, which compiles in a fraction of the whole model's time
        layers = [*model.model.layers, *(teacher.model.layers if teacher is not None else [])]
        try:
            from torch import _dynamo  # not loaded with torch

            _dynamo.reset()
            _dynamo.config.recompile_limit = 64
            for layer in layers:
                layer.compile(dynamic=False)
            loss_of = torch.compile(losses, dynamic=False)
            backward(*next(data))
        except Exception:
            traceback.print_exc()
            print(f"{kind}: torch.compile FAILED (trace above); training goes on EAGER and slower", flush=True)
            compiled, loss_of = False, losses
            for layer in layers:
                layer._compiled_call_impl = None
        optimizer.zero_grad(set_to_none=True)
        print(f"{kind}: warmed up in {time.monotonic() - start:.0f} s, compiled={compiled}", flush=True)

    step, curve, window, reported = 0, [], [], time.monotonic()
    tokens, tokens_then = args.batch * args.context, 0
    while (progress := max(step / steps, (time.monotonic() - start) / seconds)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / args.warmup) * (1 - progress)
        window.append(backward(*next(data)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 10 == 0 and device.type == "cuda":
            torch.cuda.synchronize()  # the clock above must not run ahead of the device
        now = time.monotonic()
        if now - reported >= args.report_every or step == 1:
            loss, speed = torch.stack(window).mean().item(), (step * tokens - tokens_then) / (now - reported)
            print(f"{kind}: step {step} loss {loss:.4f} {speed / 1e3:.0f}k tokens/s {now - start:.0f} s", flush=True)
            if not np.isfinite(loss):
                raise SystemExit(f"{kind}: the loss is not finite; lower the learning rate")
            curve.append({"step": step, "loss": round(loss, 4), "seconds": round(now - start, 1)})
            window, reported, tokens_then = [], now, step * tokens
    if window:
        curve.append({"step": step, "loss": round(torch.stack(window).mean().item(), 4)})
    return {"steps": step, "tokens": step * tokens, "seconds": round(time.monotonic() - start, 1), "peak_lr": lr,
            "batch": args.batch, "context": args.context, "compiled": compiled, "distilled": teacher is not None,
            "parameters": sum(p.numel() for p in model.parameters()), "curve": curve}


def save_model(model, folder):
    """bf16 weights; through a fresh model, so that nothing of the compiled and fp32 one reaches the folder."""
    out = LlamaForCausalLM(model.config).to(torch.bfloat16)
    out.load_state_dict(model.state_dict())
    out.generation_config = GenerationConfig(bos_token_id=out.config.bos_token_id, eos_token_id=out.config.eos_token_id)
    out.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written for the owner alone, which a package must not be


# ---- evaluation and cards -------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(target, draft, stream, args, device):
    """Teacher-forced losses (nats a token) and agreement on held-out text; `draft` may be None."""
    count = min(args.eval_windows, len(stream) // args.context)
    starts = np.linspace(0, len(stream) - args.context, count).astype(int)
    y = torch.from_numpy(np.stack([stream[s : s + args.context] for s in starts]).astype(np.int64))
    x = F.pad(y[:, :-1], (1, 0), value=target.config.bos_token_id)
    edges = [e for e in EDGES if e < args.context] + [args.context]
    result, best = {"positions": y.numel(), "windows": count, "text": "Python standard library, held out"}, {}
    for name, model in (("target", target), ("draft", draft)):
        if model is None:
            continue
        model.to(device).eval()
        nll, best[name] = [], []
        for part in range(0, count, 2):
            logits = model(input_ids=x[part : part + 2].to(device), use_cache=False).logits.float()
            want = y[part : part + 2].to(device)
            nll.append(F.cross_entropy(logits.flatten(0, 1), want.flatten(), reduction="none").view_as(want).cpu())
            best[name].append(logits.argmax(-1).cpu())
        nll, best[name] = torch.cat(nll), torch.cat(best[name])
        result[f"{name}_loss"] = round(nll.mean().item(), 4)
        result[f"{name}_accuracy"] = round((best[name] == y).float().mean().item(), 4)
        result[f"{name}_loss_by_position"] = {
            f"{a}-{b}": round(nll[:, a:b].mean().item(), 4) for a, b in pairwise(edges)}
    if draft is not None:
        agree = (best["target"] == best["draft"]).float()
        runs = agree.unfold(1, LOOKAHEAD, 1).cumprod(-1).sum(-1)  # leading agreements from each start position
        result["agreement"] = round(agree.mean().item(), 4)
        result["agreement_by_position"] = {
            f"{a}-{b}": round(agree[:, a:b].mean().item(), 4) for a, b in pairwise(edges)}
        # One more than the accepted draft tokens: the target's own token comes with every step.
        result[f"expected_tokens_per_step_k{LOOKAHEAD}"] = round(1 + runs.mean().item(), 3)
    return result


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [python, speculative-decoding]
---
# specattn demo {kind}

{role}
The pair shows and tests `specattn-vllm`; it is far too small to be useful as a code model.

- Architecture: LlamaForCausalLM, {layers} layers, hidden {hidden}, {heads} query / {kv} KV heads of {head_dim},
  vocabulary {vocab} (byte-level BPE), context {context}; {parameters:,} parameters, bfloat16.
- Data: Python source of {packages} installed Python packages, {stream:.1f}M tokens. Held out: the Python standard
  library, and every package whose name hashes into one part of twenty.
- Training: {steps} steps of {batch} x {context} tokens ({seen:.0f}M tokens), {seconds:.0f} s on {device}{distilled}.
- Licence: the weights are released under Apache-2.0; they were trained on installed Python packages, each under
  its own licence (names in `training.json`).
"""


def write_card(folder, kind, record):
    config, run, ev = LlamaConfig.from_pretrained(folder), record["training"], record.get("evaluation")
    role = ("The target model of the demo pair." if kind == "target"
            else "The draft model of the demo pair; it shares the target's tokenizer, KV heads and head size.")
    text = CARD.format(
        kind=kind, role=role, layers=config.num_hidden_layers, hidden=config.hidden_size, vocab=config.vocab_size,
        heads=config.num_attention_heads, kv=config.num_key_value_heads, head_dim=config.head_dim,
        context=run["context"], parameters=run["parameters"], packages=record["data"]["packages"],
        stream=record["data"]["training_tokens"] / 1e6, steps=run["steps"], batch=run["batch"],
        seen=run["tokens"] / 1e6, seconds=run["seconds"], device=record["device"],
        distilled=", half cross entropy and half KL from the target" if run["distilled"] else "")
    if ev:
        names = [n for n in ("target", "draft") if f"{n}_loss" in ev]
        text += f"\n## Held-out loss\n\nNats a token, {ev['positions']:,} positions of {ev['text']}.\n\n"
        text += f"| position | {' | '.join(names)} |\n|---|{'---|' * len(names)}\n"
        for bucket in ev["target_loss_by_position"]:
            text += f"| {bucket} | {' | '.join(str(ev[f'{n}_loss_by_position'][bucket]) for n in names)} |\n"
        text += f"| all | {' | '.join(str(ev[f'{n}_loss']) for n in names)} |\n"
        if "agreement" in ev:
            text += (f"\nThe draft's most likely token is the target's at {ev['agreement']:.1%} of the positions. With "
                     f"{LOOKAHEAD} greedy draft tokens that gives {ev[f'expected_tokens_per_step_k{LOOKAHEAD}']} "
                     "tokens a step (an estimate, on the given text rather than on the target's own).\n")
    (folder / "README.md").write_text(text)
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")


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
    sizes = dict(batch=8, context=8192, vocab=4096, target_layers=6, target_hidden=320, target_intermediate=576,
                 draft_layers=3, draft_hidden=144, draft_intermediate=320, heads=4, kv_heads=2, head_dim=64, warmup=100,
                 eval_windows=40, corpus_mb=600, tokenize_seconds=75, seed=0)
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
    print(f"corpus: {facts['files']} files of {facts['packages']} packages, {facts['characters'] / 1e6:.0f} MB, "
          f"dropped {facts['dropped_files']}, {time.monotonic() - began:.0f} s", flush=True)
    if not training:
        raise SystemExit("no training text found: give --corpus DIR, or run where packages are installed")
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
        raise SystemExit(f"the pair takes {sum(mb.values()):.2f} MB, more than --max-mb {args.max_mb}")
    if args.target and args.target.resolve() != folders["target"].resolve():
        shutil.copytree(args.target, folders["target"], dirs_exist_ok=True)
    for kind in folders if not args.target else ("draft",):
        write_tokenizer(tokenizer, configs[kind], folders[kind])
    for name in ("tokenizer.json", "tokenizer_config.json"):  # byte for byte the same, also after a reload
        shutil.copyfile(folders["target"] / name, folders["draft"] / name)
    held_stream = encode(tokenizer, held, args.tokenize_seconds, "held-out text")
    tokens = encode(tokenizer, training, args.tokenize_seconds, "training text")
    stream = torch.from_numpy(tokens.astype(np.int16)).to(device)

    budget = {"target": 0.0 if args.target else args.seconds_target, "draft": args.seconds_draft}
    if args.seconds_total:  # 45 s stay for saving, loading and the evaluation
        left = args.seconds_total - (time.monotonic() - began) - 45
        scale = min(1.0, left / max(sum(budget.values()), 1e-9))
        if scale <= 0:
            raise SystemExit("no time left to train within --seconds-total")
        budget = {kind: s * scale for kind, s in budget.items()}
        print(f"training times {({k: round(s) for k, s in budget.items()})} s", flush=True)
    common = {
        "data": {**facts, "training_tokens": len(tokens), "held_out_tokens": len(held_stream)}, "argv": argv,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU", "seed": args.seed,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                     "transformers": transformers.__version__, "tokenizers": tokenizers.__version__}}
    records = {}
    for kind in [k for k in folders if budget[k] > 0]:
        teacher = None
        if kind == "draft":  # the published bf16 target teaches, not the fp32 one: it is what the draft will meet
            teacher = AutoModelForCausalLM.from_pretrained(folders["target"], dtype=torch.bfloat16).to(device).eval()
        model = LlamaForCausalLM(configs[kind]).float()
        run = train(kind, model, stream, args, budget[kind], getattr(args, f"steps_{kind}"),
                    getattr(args, f"lr_{kind}"), teacher)
        save_model(model, folders[kind])
        records[kind] = {**common, "kind": kind, "megabytes": round(mb[kind], 2), "training": run}
        write_card(folders[kind], kind, records[kind])
        print(f"{kind}: saved after {run['steps']} steps, {time.monotonic() - began:.0f} s in all", flush=True)
        del model, teacher
    pair = [AutoModelForCausalLM.from_pretrained(folders[k], dtype=torch.bfloat16)
            if k == "target" or budget["draft"] > 0 else None for k in folders]
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
