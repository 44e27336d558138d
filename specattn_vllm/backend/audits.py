"""Adds an audit to the layers that read a selection, if the options ask for one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.logger import init_logger

from specattn_vllm.executors import Operations
from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.reporter import Reporter
from specattn_vllm.selection.audit import Audit
from specattn_vllm.stats import Counters

logger = init_logger("vllm.specattn")


def prepare_audit(
    options: SpecAttnOptions,
    layers: Mapping[str, Any],
    operations: Operations,
    counters: Counters,
    reporter: Reporter | None,
    max_num_reqs: int,
    device: torch.device,
) -> Audit | None:
    """Make the audit, with its buffers, for the target's layers that read a selection. layers: keyed by vLLM's names.
    Returns None if `audit_share` is 0. The reporter logs the results."""
    if not options.audited:
        return None
    impl = next(iter(layers.values())).impl
    audit = Audit(
        operations,
        counters,
        layers=list(layers),
        num_heads=impl.num_heads,
        num_kv_heads=impl.num_kv_heads,
        max_num_reqs=max_num_reqs,
        share=options.audited,
        device=device,
    )
    for name, layer in layers.items():
        layer.impl.audit = audit.of_layer(name)
    if reporter is not None:
        reporter.extra = audit.totals
        reporter.more.append(audit.line)
    logger.warning(
        "specattn: audit_share = %s: each step reads all keys once more in this share of its (layer, request) pairs, "
        "which takes time; set it to 0 to measure speed",
        options.audited,
    )
    return audit


def audit_of(runner: Any) -> Audit | None:
    """The audit of an engine, from vLLM's model runner; None if there is none."""
    drafter = getattr(runner, "speculator", None)
    return getattr(runner, "specattn_audit", None) or getattr(drafter, "audit", None)
