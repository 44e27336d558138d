"""The report as a table in Markdown: a row per rate and figure, a column per server."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from specattn_vllm.bench.report import LOSING, title
from specattn_vllm.bench.serve.schema import RoundResult, ServeReport, ServerResult
from specattn_vllm.bench.serve.traffic import lengths_name
from specattn_vllm.tools.outputs import table
from specattn_vllm.tools.provenance import machine, vllm_version


class Figure(NamedTuple):
    key: str
    """As `vllm bench serve` calls it."""
    title: str
    less_is_better: bool = True


FIGURES = (
    *(
        Figure(f"{kind}_{metric}_ms", f"{metric.upper()} {kind}, ms")
        for metric in ("ttft", "tpot", "itl", "e2el")
        for kind in ("mean", "median", "p99")
    ),
    Figure("request_throughput", "throughput, requests/s", False),
    Figure("output_throughput", "throughput, tokens/s", False),
    Figure("request_goodput", "goodput, requests/s", False),
)
ALSO: tuple[tuple[str, Callable[[RoundResult], float | None]], ...] = (
    ("tokens a round", lambda found: found.acceptance_length),
    ("KV read by verification, %", lambda found: _per_cent(found.kv_read.get("verification"))),
    ("KV read by drafting, %", lambda found: _per_cent(found.kv_read.get("drafting"))),
)
"""What is not compared, where a server has it."""


class Entry(NamedTuple):
    """One cell of the table."""

    value: float | None
    ratio: float | None = None
    """How many times better than plain decoding's; None where one side is missing."""
    losing: bool = False

    @property
    def text(self) -> str:
        if self.value is None:
            return "-"
        ratio = "" if self.ratio is None else f" ({self.ratio:.2f}x)"
        return number(self.value) + ratio + "†" * self.losing


def number(value: float) -> str:
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def round_of(engine: ServerResult, rate: str) -> RoundResult | None:
    return next((found for found in engine.rounds if found.rate == rate), None)


def entries(report: ServeReport, rate: str, figure: Figure) -> list[Entry]:
    """A row, an entry per server."""
    found = []
    for engine in report.engines:
        of = round_of(engine, rate)
        found.append((engine.job, of.figures.get(figure.key) if of else None))
    plain = next((value for job, value in found if job.mode == "plain"), None)
    row = []
    for job, value in found:
        if value is None:
            row.append(Entry(None))
            continue
        ratio = None if job.mode == "plain" else _better(value, plain, figure)
        # Stock vLLM decoding plainly, or speculating with the same drafter.
        stock = [
            _better(value, other, figure) for of, other in found if not of.ours and of.drafter in (None, job.drafter)
        ]
        lost = job.ours and any(times is not None and times < LOSING for times in stock)
        row.append(Entry(value, ratio, lost))
    return row


def _better(value: float, other: float | None, figure: Figure) -> float | None:
    above, below = (other, value) if figure.less_is_better else (value, other)
    return above / below if above is not None and below else None


def rows(report: ServeReport) -> list[list[str]]:
    made = []
    for rate in report.settings["request_rate"]:
        found = [round_of(engine, rate) for engine in report.engines]
        made.append([rate, "completed", *(_completed(of) for of in found)])
        for figure in FIGURES:
            row = entries(report, rate, figure)
            if any(entry.value is not None for entry in row):
                made.append([rate, figure.title, *(entry.text for entry in row)])
        for name, value in ALSO:
            values = [value(of) if of else None for of in found]
            if any(of is not None for of in values):
                made.append([rate, name, *("-" if of is None else number(of) for of in values)])
    return made


def _completed(of: RoundResult | None) -> str:
    if of is None:
        return "-"
    return f"{of.completed} of {of.requests}" + "‡" * (of.completed < of.requests)


def _per_cent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def remarks(report: ServeReport) -> list[str]:
    """What a reader of the table has to know: marks that occur, and what is missing."""
    found, settings = [], report.settings
    text = "".join(cell for row in rows(report) for cell in row)
    if "†" in text:
        found.append(f"† less than {LOSING:g} times as good as stock vLLM, plain or with the same drafter.")
    if "‡" in text:
        found.append("‡ not all requests completed; the figures are of those that did.")
    for engine in report.engines:
        if drafts := _drafts(engine):
            found.append(f"{engine.name}: {drafts}.")
        if engine.status != "ok":
            found.append(f"{engine.name}: {engine.status}, {engine.reason}.")
        for of in engine.rounds:
            at = f"{engine.name}, {of.rate} requests/s"
            if of.failed and not of.reason:
                found.append(f"{at}: {of.failed} failed: {'; '.join(of.errors) or 'no reason was given'}.")
            wanted = of.completed * settings["output_len"]
            if of.completed and of.total_output_tokens != wanted:
                found.append(f"{at}: {of.total_output_tokens:,} tokens came back, and {wanted:,} were asked for.")
    runners: dict[str, list[str]] = {}
    for engine in report.engines:
        runners.setdefault(engine.runner or "", []).append(engine.name)
    told = [f"{runner} {', '.join(names)}" for runner, names in sorted(runners.items()) if runner]
    if told:
        found.append(f"Model runner: {'; '.join(told)}.")
    if settings["device"] == "cpu":
        found.append(
            "On a CPU, where the plugin is for trying: these figures show what the command does, and no speed."
        )
    return found


def _drafts(engine: ServerResult) -> str | None:
    """How a server speculates, if it does."""
    speculation = engine.job.engine_arguments.get("speculative_config")
    if speculation is None:
        return None
    text = f"{speculation['num_speculative_tokens']} draft tokens a round"
    if (length := speculation.get("synthetic_acceptance_length")) is not None:
        text += f", of which vLLM accepts at random so many that a round gives {length:g} tokens on average"
    return text


def caption(report: ServeReport) -> str:
    settings, source = report.settings, report.provenance
    text = "`vllm bench serve` against `vllm serve`; in brackets how many times better than plain decoding. "
    text += f"{settings['num_prompts']} requests at each rate, {_arrivals(settings['burstiness'])}, of "
    text += f"{lengths_name({int(tokens): share for tokens, share in settings['input_len'].items()})} tokens, "
    text += f"{settings['output_len']} tokens of answer each; at most {settings['max_num_seqs']} at a time. "
    if settings["goodput"]:
        text += f"Goodput: {', '.join(settings['goodput'])} (ms). "
    text += "ITL is the time between pieces of an answer, and with speculation a piece has several tokens. "
    where = f"{machine(source)}, vLLM {vllm_version(source)}, {str(source.get('date', ''))[:10]}"
    return f"{text}Served: {settings['description']}; {where}."


def _arrivals(burstiness: float) -> str:
    return "Poisson arrivals" if burstiness == 1 else f"arrivals of burstiness {burstiness:g}"


def markdown(report: ServeReport) -> str:
    """As documents hold it: table, caption, remarks."""
    headings = ["requests/s", "figure", *(title(engine) for engine in report.engines)]
    lines = table(headings, rows(report))
    return "\n".join([*lines, "", caption(report), *(f"\n{remark}" for remark in remarks(report))]) + "\n"
