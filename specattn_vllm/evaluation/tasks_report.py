"""The tables of `specattn eval tasks`, as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from specattn_vllm.evaluation import columns
from specattn_vllm.evaluation.report import source, table
from specattn_vllm.evaluation.scan import byte_fraction
from specattn_vllm.evaluation.tasks_schema import TaskReport, TaskResult
from specattn_vllm.stats import Counts

HEADINGS = (
    "method", "KV read by the target", "bytes read by the target", "answered (95% interval)", "tokens right",
    "lost to dense", "won over dense",
)  # fmt: skip


def markdown(report: TaskReport) -> str:
    """A table of all prompts, one for each task, and answers by length and by depth where they differ."""
    samples = report.setup["samples"]
    every = range(len(samples))
    tasks = _groups(every, lambda i: samples[i]["task"])
    parts = [_table(report, every)] if len(tasks) > 1 else []
    parts += [f"Task `{task}`:\n\n{_table(report, chosen)}" for task, chosen in tasks.items()]
    for key, words in (("length", "By tokens of context"), ("depth", "By depth of the answer")):
        groups = _groups(every, lambda i, key=key: samples[i][key])
        if len(groups) > 1:
            parts.append(f"{words}, answered:\n\n{_across(report, groups)}")
    return "\n\n".join([*parts, caption(report)]) + "\n"


def wilson(right: int, of: int) -> tuple[float, float]:
    """95% interval of a share (Wilson's score interval), which stays within 0 and 1 and is none of width zero."""
    z = 1.959964
    middle = (right + z * z / 2) / (of + z * z)
    half = z / (of + z * z) * math.sqrt(right * (of - right) / of + z * z / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def lost_and_won(result: TaskResult, dense: TaskResult, chosen: Iterable[int]) -> tuple[int, int]:
    """Prompts that only the dense run answered, and that only this one did."""
    pairs = [(dense.samples[i].exact, result.samples[i].exact) for i in chosen]
    return pairs.count((True, False)), pairs.count((False, True))


def _groups(every: Iterable[int], key: Callable[[int], Hashable]) -> dict[Any, list[int]]:
    found: dict[Any, list[int]] = {}
    for i in every:
        found.setdefault(key(i), []).append(i)
    return found


def _table(report: TaskReport, chosen: Iterable[int]) -> str:
    rows = []
    for result in report.results:
        of = [result.samples[i] for i in chosen]
        right = sum(sample.exact for sample in of)
        low, high = wilson(right, len(of))
        counts = Counts(**result.counts)
        in_bytes = byte_fraction(counts, result.scan_share)
        compared = ("reference",) * 2 if result.is_reference else map(str, lost_and_won(result, report.dense, chosen))
        rows.append((
            result.name,
            f"{counts.kv_fraction:.1%}",
            columns.UNKNOWN.text if in_bytes is None else f"{in_bytes:.1%}",
            f"{right} of {len(of)} ({low:.0%} to {high:.0%})",
            f"{sum(sample.right for sample in of) / len(of):.1%}",
            *compared,
        ))  # fmt: skip
    return "\n".join(table(HEADINGS, rows))


def _across(report: TaskReport, groups: dict[Any, list[int]]) -> str:
    names = ["none given" if value is None else f"{value:,}" for value in groups]
    rows = [
        [result.name, *(f"{sum(result.samples[i].exact for i in of)} of {len(of)}" for of in groups.values())]
        for result in report.results
    ]
    return "\n".join(table(["method", *names], rows))


def caption(report: TaskReport) -> str:
    samples, setup = report.setup["samples"], report.setup
    tokens = [sample["tokens"] for sample in samples]
    text = f"{len(samples)} prompts of {min(tokens):,} to {max(tokens):,} tokens"
    if single := sum(sample["answer_tokens"] == 1 for sample in samples):
        text += f", of which {single} ask for a single token, which the prompt's own pass gives in every method"
    return f"{text}; K = {setup['draft_tokens']}. {source(report)}"
