"""In a server's process: gives the last snapshots of all workers to the registry behind `/metrics`."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from prometheus_client import multiprocess
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from specattn_vllm.metrics import snapshot
from specattn_vllm.metrics.families import FAMILIES, Family
from specattn_vllm.metrics.snapshot import Snapshot

KINDS = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}


class SnapshotCollector(Collector):
    """Reads the small files of a folder on each request. Workers write them at most once per second."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def describe(self) -> Iterable[Metric]:
        return [_empty(family) for family in FAMILIES]

    def collect(self) -> Iterator[Metric]:
        found = snapshot.read_all(self.folder)
        for family in FAMILIES:
            metric = _empty(family)
            for one in found:
                if family.every_rank or one.rank == 0:
                    _add(metric, family, one)
            if metric.samples:
                yield metric


def _empty(family: Family) -> Metric:
    return KINDS[family.kind](family.name, family.text, labels=family.all_labels)


def _add(metric: Metric, family: Family, found: Snapshot) -> None:
    place = [str(found.engine), *([str(found.rank)] if family.every_rank else [])]
    values = family.values(found)
    if family.kind == "histogram":
        if values:
            buckets = [[edge, n] for (edge,), n in values.items()]
            metric.add_metric(place, [*buckets, ["+Inf", buckets[-1][1]]], sum_value=found.audited.total)
        return
    for labels, value in values.items():
        metric.add_metric([*place, *labels], value)


def add_to(registry) -> None:
    """Add our metrics to the prometheus_client registry that `/metrics` of this process serves, if workers publish any.
    A second call for the same registry has no effect.

    With several servers, or if PROMETHEUS_MULTIPROC_DIR is set, there is no permanent registry: a new one is made for
    each request, with a `MultiProcessCollector` of the metrics of all servers. Ours are then added to that collector's
    metrics."""
    folder = snapshot.folder()
    if folder is None:
        return
    if os.getenv("PROMETHEUS_MULTIPROC_DIR") is not None:
        _extend(multiprocess.MultiProcessCollector)
    elif not getattr(registry, "specattn_collector", None):
        registry.specattn_collector = SnapshotCollector(folder)
        registry.register(registry.specattn_collector)


def _extend(collector: type) -> None:
    original = collector.collect
    if getattr(original, "specattn", False):
        return

    @functools.wraps(original)
    def collect(self) -> Iterator[Metric]:
        yield from original(self)
        if (folder := snapshot.folder()) is not None:
            yield from SnapshotCollector(folder).collect()

    collect.specattn = True
    collector.collect = collect
