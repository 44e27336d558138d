"""In a worker: writes its counts to the folder that servers read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

import specattn_vllm
from specattn_vllm import compat, executors
from specattn_vllm.metrics import snapshot
from specattn_vllm.metrics.snapshot import Audited, Cache, Snapshot
from specattn_vllm.selection.audit_report import lower_edge
from specattn_vllm.stats import Counts

if TYPE_CHECKING:
    import torch

    from specattn_vllm.options import SpecAttnOptions
    from specattn_vllm.reporter import Reporter

logger = init_logger("vllm.specattn")

EDGES = (16, 32, 40, 48, 52, 56, 58, 60, 61, 62, 63, 64)
"""Bins of an audit whose edges are the bucket bounds of the metrics' histogram."""


class Publisher:
    """Writes one worker's file. It never stops the engine: an error is logged once."""

    def __init__(self, folder: Path, blank: Snapshot) -> None:
        self.folder = folder
        self.blank = blank
        self._failed = False

    def write(self, counts: Counts, extra: Sequence[torch.Tensor]) -> None:
        """Write a snapshot with counts. It is used as `Reporter.publish`."""
        found = replace(self.blank, counts=counts, audited=audited(extra) if extra else None)
        try:
            found.write(self.folder)
        except OSError as error:
            if not self._failed:
                logger.warning("specattn: metrics cannot be published in %s: %s", self.folder, error)
            self._failed = True


def audited(totals: Sequence[torch.Tensor]) -> Audited:
    """Convert the totals of an audit (`Audit.totals`), on the host, to those of all layers."""
    histogram, _, retained, *_ = totals
    up_to = histogram.sum(0).cumsum(0).tolist()
    return Audited([(round(lower_edge(edge), 4), up_to[edge - 1]) for edge in EDGES], float(retained.sum()))


def start(runner: Any, options: SpecAttnOptions) -> None:
    """Publish the counts of vLLM's model runner. Called when its models are loaded and our parts are made. Counts are
    published from the first real request on, so warm-up steps are not."""
    folder = snapshot.folder()
    if folder is None:
        return
    publisher = Publisher(folder, blank(runner, options))
    publisher.write(Counts(), ())
    reporter: Reporter | None = getattr(runner.speculator, "reporter", None)
    reporter = reporter or getattr(runner, "specattn_reporter", None)
    if reporter is None:
        return
    target = getattr(runner, "specattn_target", None)
    if target is not None:
        reporter.fold = target.fold

    def step(scheduled: Any) -> None:
        if reporter.publish is None:
            if any(not compat.is_warm_up(request) for request in scheduled.scheduled_new_reqs):
                reporter.publish = publisher.write
        elif not scheduled.total_num_scheduled_tokens:
            reporter.idle()

    compat.watch_steps(runner, step)


def blank(runner: Any, options: SpecAttnOptions) -> Snapshot:
    """A snapshot that describes a worker, without counts."""
    import vllm

    config = runner.vllm_config
    caches = _caches(runner, options)
    operations = executors.of_engine(options, runner.device, config)
    served = config.model_config.served_model_name
    return Snapshot(
        engine=config.parallel_config.data_parallel_index,
        rank=config.parallel_config.rank,
        pid=os.getpid(),
        info={
            "method": options.method,
            "lossless": str(options.kind.lossless).lower(),
            "budget": options.amount if caches else "everything",
            "executor": operations.label or operations.name,
            "version": specattn_vllm.__version__,
            "vllm": vllm.__version__,
            "model_name": served if isinstance(served, str) else served[0],
        },
        dense_reasons=options.kind.dense_reasons,
        drafts=runner.speculator is not None,
        caches=caches,
    )


def _caches(runner: Any, options: SpecAttnOptions) -> dict[str, Cache]:
    """The sparse caches, by their reader, with the bytes of an entry."""
    layers = get_layers_from_vllm_config(runner.vllm_config, AttentionLayerBase)
    drafters = getattr(runner.speculator, "draft_attn_layer_names", None) or set()
    target = next(layer for name, layer in layers.items() if name not in drafters and compat.is_our_layer(layer))
    draft = next((layer for name, layer in layers.items() if name in drafters), target)
    element = executors.cache_dtype(runner.vllm_config).itemsize

    def cache(layer: Any, sketch: Any) -> Cache:
        layout = getattr(sketch, "layout", None)
        return Cache(2 * layer.impl.head_size * element, layout.token_bytes if layout is not None else 0)

    found = {"verification": cache(target, getattr(runner, "specattn_chooser", None))}
    if (selection := getattr(runner.speculator, "selection", None)) is not None:
        found["drafting"] = cache(draft, getattr(selection, "sketch", None))
    return {by: cache for by, cache in found.items() if by in options.sparse_readers}
