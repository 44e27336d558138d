"""The draft that a target teaches: its configuration, how it starts, and the training."""

import time

import torch
import torch.nn.functional as F
from demo_training import batches, optimizer_of
from refusal import Refused
from tqdm import tqdm
from transformers import LlamaConfig


def draft_config(target, args) -> LlamaConfig:
    """The target's vocabulary, positions and special tokens, with the draft's own sizes."""
    if args.hidden > target.hidden_size:
        raise Refused(
            f"--hidden {args.hidden}: at most the target's {target.hidden_size}, because the draft's "
            "embedding starts from the target's"
        )
    same = (
        "vocab_size",
        "max_position_embeddings",
        "rope_parameters",
        "rms_norm_eps",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    return LlamaConfig(
        **{name: getattr(target, name) for name in same},
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        head_dim=args.head_dim,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def principal(embedding: torch.Tensor, size: int) -> torch.Tensor:
    """The rows of `embedding` on its first `size` principal directions, each with its largest entry positive."""
    rows = embedding.double().cpu()
    directions = torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1)[:, :size]
    largest = directions.abs().argmax(0, keepdim=True)
    return (rows @ (directions * directions.gather(0, largest).sign())).float()


def distil(draft, target, x: torch.Tensor, rows: int) -> torch.Tensor:
    """Adds the gradients of the mean KL over the tokens `x`, and returns it, nats a token.

    `rows` tokens at a time behind the layers: the logits of a whole batch would take tens of gigabytes.
    """
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
        with torch.no_grad():
            wanted = target.model(input_ids=x, use_cache=False).last_hidden_state.flatten(0, 1)
        found = draft.model(input_ids=x, use_cache=False).last_hidden_state.flatten(0, 1)
        total, parts = 0.0, [part.detach().requires_grad_() for part in found.split(rows)]
        for part, hint in zip(parts, wanted.split(rows), strict=True):
            with torch.no_grad():
                goal = F.log_softmax(target.lm_head(hint).float(), -1)
            logits = F.log_softmax(draft.lm_head(part).float(), -1)
            kl = F.kl_div(logits, goal, log_target=True, reduction="sum") / len(found)
            kl.backward()
            total += kl.detach()
    found.backward(torch.cat([part.grad for part in parts]))
    return total


def train(draft, target, stream, first: int, args) -> dict:
    """Train `draft` in place until --minutes or --steps are over; returns a record."""
    began, rate = time.monotonic(), args.learning_rate
    optimizer = optimizer_of(draft, rate)
    data, step, window, curve = batches(stream, args.batch, args.context, first, args.seed), 0, [], []
    bar = tqdm(total=100, desc="distilling", bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} {postfix}")

    def done():  # a share; by the clock or by the steps, not by both, so that --steps has the same rates each time
        return step / args.steps if args.steps else (time.monotonic() - began) / (60 * args.minutes)

    while (progress := done()) < 1:
        bar.update(100 * progress - bar.n)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / args.warmup) * (1 - progress)
        window.append(distil(draft, target, next(data)[0], args.rows))
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step == 1 or step % 20 == 0:  # reading the loss waits for the device, so that the clock does not run ahead
            loss, seconds = torch.stack(window).mean().item(), time.monotonic() - began
            if loss != loss:
                raise Refused(f"the loss is not a number at step {step}: lower --learning-rate")
            curve.append({"step": step, "kl": round(loss, 4), "seconds": round(seconds, 1)})
            bar.set_postfix_str(f"KL {loss:.3f}, {step * args.batch * args.context / seconds / 1e3:.0f}k tokens/s")
            window = []
    bar.update(100 - bar.n)
    bar.close()
    if window:
        curve.append({"step": step, "kl": round(torch.stack(window).mean().item(), 4)})
    return {
        "steps": step,
        "tokens": step * args.batch * args.context,
        "seconds": round(time.monotonic() - began, 1),
        "learning_rate": rate,
        "batch": args.batch,
        "context": args.context,
        "curve": curve,
        "parameters": sum(p.numel() for p in draft.parameters()),
    }
