"""Settings, jobs and results of `specattn eval methods` that no engine had to make."""

from __future__ import annotations

import pytest

from specattn_vllm.evaluation import settings
from specattn_vllm.evaluation.job import Job
from specattn_vllm.evaluation.results import DocumentResult, SettingResult
from specattn_vllm.evaluation.schema import Setting

DRAFTS = {"rounds": 10, "tokens": 3.0, "greedy_tokens": 3.5, "accepted": [0.5] * 4, "agreed": [0.5] * 4}


@pytest.fixture
def half() -> Setting:
    return Setting(name="half", options={"rule": "top_k", "ratio": 0.5})


@pytest.fixture
def quest() -> Setting:
    return Setting(name="quest", options={"method": "dense"}, baseline={"name": "quest", "ratio": 0.5})


@pytest.fixture
def job():
    """job(setting, **changed): what an engine would be given."""

    def make(setting: Setting = settings.DENSE, **changed) -> Job:
        given = {
            "target": "/somewhere/target",
            "draft": "/somewhere/draft",
            "models": {"target": {"weights": "a"}, "draft": {"weights": "b"}},
            "documents": [[1, 2, 3], [4, 5, 6]],
            "context": 100,
            "positions": 12,
            "draft_tokens": 4,
            "free_tokens": 8,
            "batch": 2,
            "device": "cpu",
            "dtype": "float32",
        }
        return Job(setting=setting, **{**given, **changed})

    return make


@pytest.fixture
def result_of():
    """result_of(job): what an engine would have found; `more`: nats by which its documents cost more; `tokens`
    of the ten rounds of each document's free run."""

    def make(job: Job, *, more: list[float] = (0.0, 0.0), kept: float = 1.0, tokens: int = 30) -> SettingResult:
        counts = {"rounds": 10, "sampled_tokens": 50, "verify_rows": 10, "kv_read": round(kept * 1000), "kv_full": 1000}
        return SettingResult(
            name=job.setting.name,
            options=job.setting.options,
            lossless=job.setting.lossless,
            scan_share=0.0,
            job_key=job.key,
            forced=counts,
            free=counts | {"sampled_tokens": tokens},
            documents=[
                DocumentResult(nll=2 + extra, kl=0.01, agreement=0.9, rounds=10, sampled_tokens=tokens, drafts=DRAFTS)
                for extra in more
            ],
            seconds=1.0,
        )

    return make


@pytest.fixture
def of_documents(job, result_of):
    """of_documents(setting, **figures): a result with figures of documents by name; those not given are the same in
    each."""

    def make(setting: Setting, **figures: list[float]) -> SettingResult:
        count = len(next(iter(figures.values())))
        columns = {"nll": [2.0] * count, "kl": [0.01] * count, "agreement": [0.9] * count, "rounds": [10] * count}
        columns |= {"sampled_tokens": [30] * count, "drafts": [DRAFTS] * count} | figures
        documents = [
            DocumentResult(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)
        ]
        return result_of(job(setting)).model_copy(update={"documents": documents})

    return make
