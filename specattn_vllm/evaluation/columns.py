"""The columns of a table of settings: what each is called, what stands in its cells, and what they are sorted by."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from specattn_vllm.evaluation.figures import FEWEST, Difference
from specattn_vllm.evaluation.results import Estimate, Figures, SettingResult

Row = tuple[SettingResult, Figures]


class Cell(NamedTuple):
    text: str
    value: float | str


class Column(NamedTuple):
    heading: str
    short: str
    """The same where there is less room."""
    cell: Callable[[SettingResult, Figures], Cell | None]
    """None where nothing is known of a setting."""


def _share(heading: str, short: str, field: str) -> Column:
    """Of a cache."""

    def cell(_: SettingResult, found: Figures) -> Cell | None:
        share = getattr(found, field)
        return None if share is None else Cell(f"{share:.1%}", share)

    return Column(heading, short, cell)


def _estimate(heading: str, short: str, field: str, form: str, *, compared: bool = False) -> Column:
    """A figure as `form` writes it; one that is `compared` with the dense run has none of that run itself."""

    def cell(result: SettingResult, found: Figures) -> Cell | None:
        figure: Estimate | None = getattr(found, field)
        if figure is None:
            return None
        if compared and result.is_reference:
            return Cell("reference", figure.value)
        is_floor = field == "kl_above_rounding" and result.other_batches
        return Cell("floor" if is_floor else figure.text(form), figure.value)

    return Column(heading, short, cell)


COLUMNS = (
    Column("method", "method", lambda result, _: Cell(result.name, result.name)),
    _share("KV read by the target", "KV read by the target", "kv_read"),
    _share("bytes read by the target", "bytes", "bytes_read"),
    _share("KV read by the draft", "by the draft", "draft_kv_read"),
    _estimate("KL to dense", "KL to dense", "kl", "z.4f", compared=True),
    _estimate("KL above rounding", "above rounding", "kl_above_rounding", "z.4f", compared=True),
    _estimate("top-1 agreement", "top-1 agreement", "agreement", ".1%", compared=True),
    _estimate("perplexity change", "perplexity change", "perplexity_change", "+z.2%", compared=True),
    _estimate("acceptance along the text", "along the text", "text_tokens", ".2f"),
    _estimate("the same, greedy", "greedy", "text_greedy_tokens", ".2f"),
    _estimate("acceptance, free run", "free run", "acceptance_length", ".2f"),
    Column("lossless", "lossless", lambda result, _: Cell(*["yes" if result.lossless else "no"] * 2)),
)
UNKNOWN = Cell("not counted", -1.0)

# Fields of a `Difference`: what they are called and how they are written.
DIFFERENCES = (
    ("kl", "KL", "+z.4f"), ("agreement", "top-1 agreement", "+z.2%"), ("nll", "loss (nats a token)", "+z.4f"),
    ("text_tokens", "acceptance along the text", "+z.2f"), ("text_greedy_tokens", "the same, greedy", "+z.2f"),
    ("acceptance_length", "acceptance, free run", "+z.2f"),
)  # fmt: skip


def table(rows: list[Row]) -> tuple[list[Column], list[list[Cell]]]:
    """The columns in which something is known of some setting, and the cells of each row under them."""
    found = [[column.cell(*row) for column in COLUMNS] for row in rows]
    shown = [number for number in range(len(COLUMNS)) if any(cells[number] is not None for cells in found)]
    return [COLUMNS[number] for number in shown], [[cells[number] or UNKNOWN for number in shown] for cells in found]


def sureness(documents: int) -> str:
    """What a reader has to know of the differences of so many documents."""
    if documents >= FEWEST:
        return "Bold: 0 is not in it."
    few = f"{documents} document{'s' * (documents != 1)}"
    return (
        f"None is called sure of {few}: fewer than {FEWEST} may all lie on one side by chance, and their intervals are "
        "too narrow."
    )


def differences(found: list[Difference], documents: int) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Headings of those differences of which some are known, and of each row the texts under them, with whether they
    are sure, which takes `FEWEST` documents."""
    shown = [column for column in DIFFERENCES if any(getattr(each, column[0]) is not None for each in found)]

    def cell(estimate: Estimate | None, form: str) -> tuple[str, bool]:
        if estimate is None:
            return UNKNOWN.text, False
        return estimate.text(form), estimate.is_sure and documents >= FEWEST

    return [heading for _, heading, _ in shown], [
        [cell(getattr(each, field), form) for field, _, form in shown] for each in found
    ]
