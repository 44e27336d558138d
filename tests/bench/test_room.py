"""What a cell needs of the KV cache, where there is less."""

from __future__ import annotations

from types import SimpleNamespace

from specattn_vllm.bench import grid, jobs, worker
from specattn_vllm.tools import models


def test_a_cell_that_needs_too_much_is_told_in_tokens_and_bytes(tmp_path):
    """What a worker says of it, with a configuration of vLLM's in outline."""
    request = jobs.Request(
        shape=models.load_shape("demo"), grid=grid.parse_grid("4x1k"), modes=["draft-v2"], kept=[], device="cpu"
    )
    (job,) = jobs.make_jobs(request)

    def model(name: str, layers: int):
        return SimpleNamespace(
            model=name, get_num_layers=lambda parallel: layers, get_num_kv_heads=lambda parallel: 2,
            get_head_size=lambda: 64, dtype=SimpleNamespace(itemsize=4),
        )  # fmt: skip

    config = SimpleNamespace(
        model_config=model("target", 6), parallel_config=None,
        speculative_config=SimpleNamespace(draft_model_config=model("draft", 2)),
    )  # fmt: skip
    assert worker.kv_bytes(config) == 2 * 8 * 2 * 64 * 4
    config.speculative_config.draft_model_config = config.model_config  # drafts for itself
    assert worker.kv_bytes(config) == 2 * 6 * 2 * 64 * 4
    config.speculative_config = None
    assert worker.kv_bytes(config) == 2 * 6 * 2 * 64 * 4

    found = worker.Worker(job, tmp_path / "result", tmp_path / "events")
    found.result.kv_cache_tokens = 1000
    found.llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config))
    needed = 4 * (job.cells[0].prompt_tokens + job.generated_tokens)
    skipped = found._measure_cell(job.cells[0]).skipped
    assert f"needs a KV cache of {needed:,} tokens, about {needed * 6144 / 1e6:.1f} MB" in skipped
    assert "room for 1,000, about 6.1 MB" in skipped and "VLLM_CPU_KVCACHE_SPACE" in skipped
