"""The snapshot of a worker."""

from __future__ import annotations

import os
from dataclasses import fields

import pytest

from specattn_vllm.methods import METHODS
from specattn_vllm.metrics.families import INFO
from specattn_vllm.metrics.snapshot import Cache, Snapshot
from specattn_vllm.stats import Counts

COUNTS = Counts(*(1000 * (i + 1) for i in range(len(fields(Counts)))))
CACHES = {"verification": Cache(512, 34), "drafting": Cache(256)}


def snapshot_of(**given) -> Snapshot:
    info = {label: f"a {label}" for label in INFO}
    return Snapshot(
        **{
            "engine": 0,
            "rank": 0,
            "pid": os.getpid(),
            "info": info,
            "dense_reasons": METHODS["sketch"].dense_reasons,
            "drafts": True,
            "caches": CACHES,
            "counts": COUNTS,
            **given,
        }
    )


@pytest.fixture
def made():
    """made(**fields) -> a worker's snapshot, with other counts and labels than any default."""
    return snapshot_of
