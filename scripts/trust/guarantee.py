#!/usr/bin/env python3
"""How good is the guarantee's check? The bound on what each row has lost, beside what it has really lost.

    eval "$(specattn cpu-env)"
    .venv/bin/python scripts/trust/guarantee.py --target "$(scripts/real_model)" --text TEXTS/*/00* --out guarantee.json

A sparse engine samples text after each document. Nothing falls dense here: each selection is checked in all ways that
are compared (number of draws; drawn by the sketch's scores, or uniformly as in vAttention), and its true loss is
computed from all keys. An audit of a share of the selections runs beside, as it would in production.
"""

import argparse
import functools
import shlex
import sys
import time
from pathlib import Path
from statistics import NormalDist

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there by itself under PYTHONSAFEPATH=1
from sampled import add_arguments, sampled, setup

from specattn_vllm.kernels.guarantee import contracts, reference
from specattn_vllm.sketch.layer import LayerSketch
from specattn_vllm.tools.outputs import write_json
from specattn_vllm.tools.provenance import provenance

WAYS = {
    "32 draws": (32, contracts.TEMPERATURE, contracts.UNIFORM_PART),
    "64 draws": (64, contracts.TEMPERATURE, contracts.UNIFORM_PART),
    "128 draws": (128, contracts.TEMPERATURE, contracts.UNIFORM_PART),
    "64 draws, all of them by the scores": (64, 1.0, contracts.UNIFORM_PART),
    "64 draws, uniform": (64, 0.0, 1),
}
"""Way of drawing -> draws, exponent of the estimated weight, and one in how many is uniform."""
EPSILONS = (0.05, 0.1, 0.2, 0.3)
DELTAS = (0.05, 0.01)


class Watch:
    """Stands for the guarantee in all layers. Keeps of each query row and head: mean and standard error of the unread
    mass, by way, in units of the read mass; and the true loss."""

    def __init__(self) -> None:
        self.found: dict[str, list[torch.Tensor]] = {way: [] for way in WAYS}
        self.true: list[torch.Tensor] = []
        self.kept: list[torch.Tensor] = []

    def confirm(self, layer, step, batch, out, lse) -> None:
        query, kv_cache, block_table, seq_lens, starts, scale = batch
        sketch, rows, block_size, size = layer.sketch, step.num_rows, kv_cache.shape[2], query.shape[2]
        heads, group = kv_cache.shape[1], query.shape[1] // kv_cache.shape[1]
        samples = {}
        for way, (draws, temperature, part) in WAYS.items():
            reference.weight_table = functools.partial(contracts.weight_table, temperature=temperature)
            reference.UNIFORM_PART = part
            sample = torch.full((rows, heads, draws), -1, dtype=torch.int32), torch.zeros(rows, heads, draws)
            ends = sketch.budget.sink, sketch.budget.recent
            scored = [t[:rows] for t in (sketch.scores, sketch.histogram, sketch.chunks, sketch.cuts, sketch.starts)]
            reference.sample_unread(*scored, starts, seq_lens, *ends, layer.index, *sample)
            samples[way] = sample
        for r in range(rows):
            if samples["64 draws"][0][r, 0, 0] < 0 or starts[r + 1] - starts[r] != 1:
                continue
            p = torch.arange(int(seq_lens[r]))
            blocks = block_table[r, p // block_size].long()
            for head in range(heads):
                mine = slice(head * group, (head + 1) * group)
                keys = kv_cache[blocks, head, p % block_size, :size].float()
                logits = scale * query[int(starts[r]), mine].float() @ keys.T
                read = lse[int(starts[r]), mine]
                self.true.append(1 - (read - logits.logsumexp(-1)).exp())
                self.kept.append(sketch.kept[layer.index, r, head] / len(p))
                for way, (positions, worth) in samples.items():
                    x = (logits[:, positions[r, head].long()] - read[:, None]).exp() * worth[r, head]
                    self.found[way].append(torch.stack((x.mean(-1), x.std(-1) / x.shape[1] ** 0.5), -1))

    def report(self) -> dict:
        true, kept = torch.stack(self.true), torch.stack(self.kept)  # [selections, query heads]
        ways = {}
        for way, found in self.found.items():
            mean, error = torch.stack(found).unbind(-1)
            told = {"mean_estimate": float((mean / (1 + mean)).mean())}
            for delta in DELTAS:
                upper = mean + NormalDist().inv_cdf(1 - delta) * error
                bound = upper / (1 + upper)
                told[f"delta {delta}"] = {
                    "bound_below_truth": float((bound < true).float().mean()),
                    **{f"epsilon {e}": self._of(bound, true, kept, e) for e in EPSILONS},
                }
            ways[way] = told
        quantiles = {f"p{round(100 * q)}": float(true.quantile(q)) for q in (0.1, 0.5, 0.9, 0.99)}
        loss = {"mean": float(true.mean()), **quantiles}
        return {"selections": len(true), "rows": true.numel(), "true_loss": loss, "ways": ways}

    @staticmethod
    def _of(bound: torch.Tensor, true: torch.Tensor, kept: torch.Tensor, epsilon: float) -> dict:
        lost, falls = true > epsilon, (bound > epsilon).any(1)
        unnoticed = lost & ~falls[:, None]
        return {
            "rows_that_lose_more": float(lost.float().mean()),
            "of_them_unnoticed": float(unnoticed.sum() / lost.sum().clamp(min=1)),
            "heads_that_fall": float(falls.float().mean()),
            "of_them_needlessly": float((falls & ~lost.any(1)).sum() / falls.sum().clamp(min=1)),
            "entries_read": float((kept + falls).mean()),
        }


def run(args: argparse.Namespace) -> dict:
    watch = Watch()
    LayerSketch.confirm = lambda layer, *given: watch.confirm(layer, *given)
    llm = sampled(args, {"ratio": args.ratio, "epsilon": 0.1, "audit_share": args.audit_share})
    [audit] = llm.collective_rpc("specattn_audit")
    pairs = sum(layer["pairs"] for layer in audit.values())
    retained = sum(layer["retained_mean"] * layer["pairs"] for layer in audit.values()) / pairs
    found = watch.report()
    return found | {"audit": {"share": args.audit_share, "pairs": pairs, "mean_loss": 1 - retained}}


def main() -> None:
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_arguments(parser, steps=16)
    parser.add_argument(
        "--audit-share",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="of the selections, whose loss is measured [0.05]",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    found = run(args)
    report = provenance() | {"command": shlex.join(["scripts/trust/guarantee.py", *sys.argv[1:]]), "setup": setup(args)}
    write_json(args.out, report | {"seconds": round(time.monotonic() - begin), **found})
    print(args.out)


if __name__ == "__main__":
    main()
