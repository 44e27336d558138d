#!/usr/bin/env python3
"""How far are audits from the truth? Audits of a share of the selections, beside an audit of them all.

    eval "$(specattn cpu-env)"
    .venv/bin/python scripts/trust/audit_error.py --target "$(scripts/real_model)" --text TEXTS/*/0* --out audit.json

A sparse engine samples text after each document, and audits every pair of layer and request (which is exact:
tests/engine/test_audit.py). In each step the pairs that smaller shares would have audited are noted, as the engine
chooses them. The time is cut into windows, in the place of the minutes of a dashboard. Of each window:

error         of the mean loss that a share finds, relative to the true one.
false alarms  windows whose true mean loss is below a limit, while the audit's is above it; misses: the other way round.
              Limits lie a tenth and a quarter above and below each window's true mean.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there by itself under PYTHONSAFEPATH=1
from sampled import add_arguments, sampled, setup

from specattn_vllm.selection.audit import Audit
from specattn_vllm.tools.outputs import write_json
from specattn_vllm.tools.provenance import provenance

DISTANCES = (0.1, 0.25)


class Watch:
    """Keeps the loss of each pair of layer and request, by step, and which pairs each share would have audited."""

    def __init__(self, shares: list[float]) -> None:
        self.shares = shares
        self.loss: list[np.ndarray] = []
        """Of each step [A layers, R requests], nan where nothing was selected."""
        self.chosen: dict[float, list[np.ndarray]] = {share: [] for share in shares}
        self.beside: dict[float, Audit] = {}
        self.choose, self.fold = Audit.choose, Audit.fold
        Audit.choose = lambda audit, *given: self.on_choose(audit, *given)
        Audit.fold = lambda audit: self.on_fold(audit)

    def on_choose(self, audit: Audit, *given) -> None:
        self.choose(audit, *given)
        for share in self.shares:
            if share not in self.beside:
                self.beside[share] = Audit(
                    audit.operations,
                    audit.counters,
                    layers=audit.layers,
                    num_heads=audit.num_heads,
                    num_kv_heads=audit.largest_values.shape[1],
                    max_num_reqs=audit.scored_rows.shape[1],
                    share=share,
                    device=audit.device,
                )
            self.choose(self.beside[share], *given)

    def on_fold(self, audit: Audit) -> None:
        if rows := audit._rows:
            retained = (audit.lse_selected[:, :rows] - audit.lse_full[:, :rows]).exp().clamp(max=1.0)
            loss = (1 - retained).mean(-1).double().cpu().numpy()
            loss[(audit.scored_rows[:, :rows, 0] < 0).cpu().numpy()] = np.nan
            self.loss.append(loss)
            for share, beside in self.beside.items():
                self.chosen[share].append((beside.scored_rows[:, :rows, 0] >= 0).cpu().numpy())
        self.fold(audit)

    def report(self, window: int) -> dict:
        """window: steps."""
        windows = [slice(begin, begin + window) for begin in range(0, len(self.loss) - window + 1, window)]
        true = np.array([np.nanmean(np.concatenate(self.loss[of], 1)) for of in windows])
        every = np.concatenate([loss[~np.isnan(loss)] for loss in self.loss])
        found = {"pairs": len(every), "mean_loss": every.mean(), "windows": len(windows)}
        found["pairs_of_a_window"] = round(len(every) / max(len(self.loss), 1) * window)
        found["shares"] = {str(share): self.of(share, windows, true, every.mean()) for share in self.shares}
        return found

    def of(self, share: float, windows: list[slice], true: np.ndarray, mean: float) -> dict:
        seen = [loss[of & ~np.isnan(loss)] for loss, of in zip(self.loss, self.chosen[share], strict=True)]
        told = np.array([np.concatenate(seen[of]).mean() for of in windows])
        error, whole = told / true - 1, np.concatenate(seen)
        alarms = {}
        for distance in DISTANCES:
            alarms[f"limit {distance:.0%} away"] = {
                "false_alarms": float((told > (1 + distance) * true).mean()),
                "misses": float((told < (1 - distance) * true).mean()),
            }
        return {
            "pairs": len(whole),
            "error_of_the_whole": whole.mean() / mean - 1,
            "error_of_a_window": {"mean": error.mean(), "deviation": error.std(ddof=1), "most": np.abs(error).max()},
            "windows_within_a_tenth": float((np.abs(error) <= 0.1).mean()),
            **alarms,
        }


def rounded(value):
    if isinstance(value, dict):
        return {name: rounded(of) for name, of in value.items()}
    return round(float(value), 5) if isinstance(value, float) else value


def main() -> None:
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, steps=256)
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.01, 0.05], metavar="S", help="of audit_share [0.01 0.05]"
    )
    parser.add_argument("--window", type=int, default=16, metavar="N", help="steps of a window [%(default)s]")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    watch = Watch(args.shares)
    sampled(args, {"ratio": args.ratio, "audit_share": 1.0})
    report = provenance() | {
        "command": shlex.join(["scripts/trust/audit_error.py", *sys.argv[1:]]),
        "setup": setup(args),
    }
    write_json(args.out, report | {"window": args.window, **rounded(watch.report(args.window))})
    print(f"{args.out}: {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
