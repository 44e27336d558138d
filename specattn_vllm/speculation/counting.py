"""Counts rounds. When a round of drafting begins, it is known how many tokens of the round before were accepted."""

from __future__ import annotations

from typing import Any

import torch
from vllm.utils.torch_utils import async_tensor_h2d

from specattn_vllm import compat, executors
from specattn_vllm.executors import Operations
from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.reporter import Reporter
from specattn_vllm.stats import Counters


def count_round(counters: Counters, operations: Operations, batch: Any, num_sampled: torch.Tensor) -> None:
    """Count the rows of vLLM's batch that verified drafts, and the tokens that they sampled, num_sampled [R]."""
    drafts, num_reqs = batch.num_draft_tokens_per_req, batch.num_reqs
    if drafts is None:
        return
    # vLLM pads a request with one prompt token left to the length of a verification. Its drafts are not real.
    verified = (drafts[:num_reqs] > 0) & ~batch.is_prefilling_np[:num_reqs]
    rounds = int(verified.sum())
    counters.add(rounds=rounds)
    if rounds:
        # In most batches all rows verify; no mask is sent to the device then.
        mask = None if rounds == num_reqs else async_tensor_h2d(verified, device=num_sampled.device)
        operations.count_sampled(num_sampled[:num_reqs], mask, counters.on_device("sampled_tokens"))


def watch_drafter(runner: Any, options: SpecAttnOptions) -> None:
    """Count the rounds of the drafter beside a target whose steps are not counted; called when the drafter is loaded. A
    speculator of ours counts by itself. Of another drafter, the KV entries read are not counted, and without a drafter
    there are no rounds."""
    if getattr(runner.speculator, "counters", None) is not None:
        compat.at_first_request(runner.model_state, runner.speculator.count_from_zero)
        return
    config = runner.vllm_config
    operations = executors.of_engine(options, runner.device, config)
    counters = Counters(runner.device)
    reporter = Reporter(counters, options.stats_interval_s, logs=config.parallel_config.rank == 0)

    def count(batch: Any, sampled: torch.Tensor) -> None:
        count_round(counters, operations, batch, sampled)
        reporter.tick()

    compat.count_rounds(runner, count)

    def reset() -> None:
        counters.reset()
        reporter.reset()

    compat.at_first_request(runner.model_state, reset)
    runner.specattn_counters, runner.specattn_reporter = counters, reporter
