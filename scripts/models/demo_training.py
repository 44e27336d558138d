"""Training of the demo pair: the target on text, the draft on text and on the target's distributions."""

import time

import numpy as np
import torch
import torch.nn.functional as F
from refusal import Refused


def batches(stream, batch, context, bos, seed):
    """Endless (x, y), each [batch, context]: x is <|bos|> and the text one token behind y; a new phase each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        phase = int(torch.randint(context, (1,), generator=generator))
        count = (len(stream) - phase) // context
        if count < batch:
            raise Refused(f"{len(stream)} training tokens do not fill a batch of {batch} x {context}")
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


def optimizer_of(model, lr):
    """AdamW, with weight decay for matrices alone."""
    matrices, rest = ([p for p in model.parameters() if (p.ndim > 1) == wide] for wide in (True, False))
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.95),
        fused=rest[0].is_cuda,
    )


def train(kind, model, stream, args, seconds, steps, lr, teacher=None):
    """Train `model` in place until `seconds` (compilation counted) or `steps` are over; returns a record."""
    start, device = time.monotonic(), stream.device
    model.to(device).train()
    optimizer = optimizer_of(model, lr)
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
        from torch import _dynamo  # not loaded with torch

        _dynamo.reset()
        _dynamo.config.recompile_limit = 64
        for layer in layers:
            layer.compile(dynamic=False)
        loss_of = torch.compile(losses, dynamic=False)
        backward(*next(data))
        optimizer.zero_grad(set_to_none=True)
        print(f"{kind}: compiled in {time.monotonic() - start:.0f} s", flush=True)

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
                raise Refused(f"{kind}: the loss is not finite; lower the learning rate")
            curve.append({"step": step, "loss": round(loss, 4), "seconds": round(now - start, 1)})
            window, reported, tokens_then = [], now, step * tokens
    if window:
        curve.append({"step": step, "loss": round(torch.stack(window).mean().item(), 4)})
    return {
        "steps": step,
        "tokens": step * tokens,
        "seconds": round(time.monotonic() - start, 1),
        "peak_lr": lr,
        "batch": args.batch,
        "context": args.context,
        "compiled": compiled,
        "distilled": teacher is not None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "curve": curve,
    }
