"""Evaluation of the demo pair on held-out text, and the model cards that report it."""

import json
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig

EDGES = (0, 512, 1024, 2048, 4096, 8192)  # position buckets of the evaluation, in tokens
LOOKAHEAD = 4  # draft tokens a step, for the acceptance estimate


@torch.inference_mode()
def evaluate(target, draft, stream, args, device, text="Python standard library, held out", first=None):
    """Teacher-forced losses (nats a token) and agreement on held-out text; `draft` may be None.

    first: the token before each window; the target's <|bos|> unless given.
    """
    count = min(args.eval_windows, len(stream) // args.context)
    starts = np.linspace(0, len(stream) - args.context, count).astype(int)
    y = torch.from_numpy(np.stack([stream[s : s + args.context] for s in starts]).astype(np.int64))
    x = F.pad(y[:, :-1], (1, 0), value=target.config.bos_token_id if first is None else first)
    edges = [e for e in EDGES if e < args.context] + [args.context]
    result, best = {"positions": y.numel(), "windows": count, "text": text}, {}
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
            f"{a}-{b}": round(nll[:, a:b].mean().item(), 4) for a, b in pairwise(edges)
        }
    if draft is not None:
        agree = (best["target"] == best["draft"]).float()
        runs = agree.unfold(1, LOOKAHEAD, 1).cumprod(-1).sum(-1)  # leading agreements from each start position
        result["agreement"] = round(agree.mean().item(), 4)
        result["agreement_by_position"] = {
            f"{a}-{b}": round(agree[:, a:b].mean().item(), 4) for a, b in pairwise(edges)
        }
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
- Licence: weights and tokenizer are released under Apache-2.0. They were trained on the source of those packages, each
  under its own licence: `training.json` names them, their licences were not recorded. None of their text is in this
  repository.
"""


def write_card(folder, kind, record):
    config, run, ev = LlamaConfig.from_pretrained(folder), record["training"], record.get("evaluation")
    role = (
        "The target model of the demo pair."
        if kind == "target"
        else "The draft model of the demo pair; it shares the target's tokenizer, KV heads and head size."
    )
    text = CARD.format(
        kind=kind,
        role=role,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        heads=config.num_attention_heads,
        kv=config.num_key_value_heads,
        head_dim=config.head_dim,
        context=run["context"],
        parameters=run["parameters"],
        packages=record["data"]["packages"],
        stream=record["data"]["training_tokens"] / 1e6,
        steps=run["steps"],
        batch=run["batch"],
        seen=run["tokens"] / 1e6,
        seconds=run["seconds"],
        device=record["device"],
        distilled=", half cross entropy and half KL from the target" if run["distilled"] else "",
    )
    if ev:
        names = [n for n in ("target", "draft") if f"{n}_loss" in ev]
        text += f"\n## Held-out loss\n\nNats a token, {ev['positions']:,} positions of {ev['text']}.\n\n"
        text += f"| position | {' | '.join(names)} |\n|---|{'---|' * len(names)}\n"
        for bucket in ev["target_loss_by_position"]:
            text += f"| {bucket} | {' | '.join(str(ev[f'{n}_loss_by_position'][bucket]) for n in names)} |\n"
        text += f"| all | {' | '.join(str(ev[f'{n}_loss']) for n in names)} |\n"
        if "agreement" in ev:
            text += (
                f"\nThe draft's most likely token is the target's at {ev['agreement']:.1%} of the positions. With "
                f"{LOOKAHEAD} greedy draft tokens that gives {ev[f'expected_tokens_per_step_k{LOOKAHEAD}']} "
                "tokens a step (an estimate, on the given text rather than on the target's own).\n"
            )
    (folder / "README.md").write_text(text)
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
