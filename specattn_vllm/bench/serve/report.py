"""The report as a table in Markdown: a row per rate and figure, a column per server."""

from __future__ import annotations

from typing import NamedTuple

from specattn_vllm.bench.report import LOSING, title
from specattn_vllm.bench.serve.schema import RoundResult, ServeJob, ServeReport, ServerResult
from specattn_vllm.bench.serve.traffic import lengths_name
from specattn_vllm.tools.outputs import document
from specattn_vllm.tools.provenance import where


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


def round_of(engine: ServerResult, rate: str) -> RoundResult:
    """Of no requests where the server has none at this rate."""
    return next((found for found in engine.rounds if found.rate == rate), RoundResult(rate=rate, requests=0))


def entries(report: ServeReport, rate: str, figure: Figure) -> list[Entry]:
    """A row, an entry per server."""
    found = [(engine.job, round_of(engine, rate).figures.get(figure.key)) for engine in report.engines]
    return [_entry(job, value, found, figure) for job, value in found]


def _entry(job: ServeJob, value: float | None, found: list[tuple[ServeJob, float | None]], figure: Figure) -> Entry:
    if value is None:
        return Entry(None)
    # Stock vLLM decoding plainly, or speculating with the same drafter.
    alike = [(of.mode, other) for of, other in found if not of.ours and of.drafter in (None, job.drafter)]
    stock = {mode: _better(value, other, figure) for mode, other in alike}
    lost = job.ours and any(times is not None and times < LOSING for times in stock.values())
    return Entry(value, None if job.mode == "plain" else stock.get("plain"), lost)


def _better(value: float, other: float | None, figure: Figure) -> float | None:
    above, below = (other, value) if figure.less_is_better else (value, other)
    return above / below if above is not None and below else None


def _completed(of: RoundResult) -> str:
    return f"{of.completed} of {of.requests}" + "‡" * (of.completed < of.requests) if of.requests else "-"


def rows(report: ServeReport) -> list[list[str]]:
    made = []
    for rate in report.settings["request_rate"]:
        found = [round_of(engine, rate) for engine in report.engines]
        made.append([rate, "completed", *map(_completed, found)])
        compared = [(figure.title, entries(report, rate, figure)) for figure in FIGURES]
        also = [("tokens a round", [Entry(of.acceptance_length) for of in found])]
        for by in ("verification", "drafting"):
            shares = [of.kv_read.get(by) for of in found]
            also.append((f"KV read by {by}, %", [Entry(share and 100 * share) for share in shares]))
        for name, row in compared + also:
            if any(entry.value is not None for entry in row):
                made.append([rate, name, *(entry.text for entry in row)])
    return made


def remarks(report: ServeReport) -> list[str]:
    """What a reader of the table has to know: marks that occur, and what is missing."""
    found, settings = [], report.settings
    text = "".join(cell for row in rows(report) for cell in row)
    if "†" in text:
        found.append(f"† less than {LOSING:g} times as good as stock vLLM, plain or with the same drafter.")
    if "‡" in text:
        found.append("‡ not all requests completed; the figures are of those that did.")
    for engine in report.engines:
        if drafter := engine.job.engine_arguments.get("speculative_config"):
            told = f"{engine.name}: {drafter['num_speculative_tokens']} draft tokens a round"
            if (length := drafter.get("synthetic_acceptance_length")) is not None:
                told += f", of which vLLM accepts at random so many that a round gives {length:g} tokens on average"
            found.append(f"{told}.")
        if engine.status != "ok":
            found.append(f"{engine.name}: {engine.status}, {engine.reason}.")
        for of in engine.rounds:
            at = f"{engine.name}, {of.rate} requests/s"
            if of.failed and not of.reason:
                found.append(f"{at}: {of.failed} failed: {'; '.join(of.errors) or 'no reason was given'}.")
            wanted = of.completed * settings["output_len"]
            if of.completed and of.total_output_tokens != wanted:
                found.append(f"{at}: {of.total_output_tokens:,} tokens came back, and {wanted:,} were asked for.")
    names = {of.runner: [each.name for each in report.engines if each.runner == of.runner] for of in report.engines}
    told = [f"{runner} {', '.join(names[runner])}" for runner in sorted(filter(None, names))]
    if told:
        found.append(f"Model runner: {'; '.join(told)}.")
    if settings["device"] == "cpu":
        found.append(
            "On a CPU, where the plugin is for trying: these figures show what the command does, and no speed."
        )
    return found


def caption(report: ServeReport) -> str:
    settings = report.settings
    burstiness = settings["burstiness"]
    arrivals = "Poisson arrivals" if burstiness == 1 else f"arrivals of burstiness {burstiness:g}"
    lengths = lengths_name({int(tokens): share for tokens, share in settings["input_len"].items()})
    good = f"Goodput: {', '.join(settings['goodput'])} (ms). " if settings["goodput"] else ""
    return (
        "`vllm bench serve` against `vllm serve`; in brackets how many times better than plain decoding. "
        f"{settings['num_prompts']} requests at each rate, {arrivals}, of {lengths} tokens, {settings['output_len']} "
        f"tokens of answer each; at most {settings['max_num_seqs']} at a time. {good}"
        "ITL is the time between pieces of an answer, and with speculation a piece has several tokens. "
        f"Served: {settings['description']}; {where(report.provenance)}."
    )


def markdown(report: ServeReport) -> str:
    """As documents hold it: table, caption, remarks."""
    headings = ["requests/s", "figure", *(title(engine) for engine in report.engines)]
    return document(headings, rows(report), caption(report), *remarks(report))
