"""The results of audits as readable numbers: quantiles of the retained mass and the error bound, by layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

BINS = 64
QUANTILES = (0.01, 0.10, 0.50)


def lower_edge(bin_index: int) -> float:
    """Smallest retained mass in a bin. Bins have equal widths in the square root of the missing mass, so they are
    narrow near a retained mass of 1: the last one begins at 0.9998, the first ends at 0.03."""
    return 1.0 - (1.0 - bin_index / BINS) ** 2


def quantile(histogram: torch.Tensor, q: float) -> float:
    """The lower edge of the bin that contains quantile `q` of a histogram [BINS]; nan for an empty histogram."""
    total = int(histogram.sum())
    if total == 0:
        return float("nan")
    reached = histogram.cumsum(0) >= max(q * total, 1)
    return lower_edge(int(reached.int().argmax()))


@dataclass(frozen=True)
class AuditTotals:
    """Totals by layer, on the host. A sample is one query head of an audited pair; each pair has `heads` samples."""

    layers: tuple[str, ...]
    heads: int
    histogram: torch.Tensor
    """[A, BINS] int64: number of samples by retained mass."""
    pairs: torch.Tensor
    """[A] int64: number of audited pairs."""
    retained: torch.Tensor
    bound: torch.Tensor
    """[A] float64: sums over samples."""
    largest_bound: torch.Tensor
    """[A] float32: maximum since the start."""

    def since(self, earlier: AuditTotals) -> AuditTotals:
        """These totals minus earlier ones. Only the largest bound remains the maximum since the start."""
        changed = {
            name: getattr(self, name) - getattr(earlier, name) for name in ("histogram", "pairs", "retained", "bound")
        }
        return replace(self, **changed)

    def by_layer(self) -> dict[str, dict[str, float]]:
        """Layer name -> results of its audits. Layers without an audit are left out."""
        found = {}
        for i, layer in enumerate(self.layers):
            if pairs := int(self.pairs[i]):
                samples = pairs * self.heads
                found[layer] = {
                    "pairs": pairs,
                    **{f"retained_p{round(100 * q)}": quantile(self.histogram[i], q) for q in QUANTILES},
                    "retained_mean": float(self.retained[i]) / samples,
                    "bound_mean": float(self.bound[i]) / samples,
                    "bound_max": float(self.largest_bound[i]),
                }
        return found

    def line(self) -> str | None:
        """The log line for these totals; None if nothing was audited."""
        pairs = int(self.pairs.sum())
        if not pairs:
            return None
        whole = self.histogram.sum(0)
        quantiles = ", ".join(f"p{round(100 * q)} {quantile(whole, q):.3f}" for q in QUANTILES)
        by_layer = self.by_layer()
        lowest = min(by_layer, key=lambda layer: by_layer[layer]["retained_mean"])
        return (
            f"specattn: audit of {pairs} pairs of layer and request: retained mass {quantiles}; lowest mean "
            f"{by_layer[lowest]['retained_mean']:.3f} in {lowest}; error bound "
            f"{float(self.bound.sum()) / (pairs * self.heads):.3g} on average"
        )
