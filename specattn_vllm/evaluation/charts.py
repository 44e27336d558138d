"""Where the marks of a report's pictures go: charts in SVG user units, heat maps as small PNG images."""

from __future__ import annotations

import base64
import math
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 20, 14, 44
COLOURS = 10
"""How many the page's style sheet has: one for each method."""
MARKS = ("circle", "square", "triangle", "diamond", "ring", "box", "down", "cross")
"""For the variants of one method, which share its colour."""


DASHES = 4


class Value(NamedTuple):
    """One setting in one chart."""

    name: str
    x: float
    y: float
    interval: tuple[float, float] | None = None
    entries: float | None = None
    """Share of the cache's entries that is read, where x is one of its bytes."""


class Point(NamedTuple):
    """The same, placed; low and high are the ends of its interval."""

    x: float
    y: float
    low: float | None
    high: float | None
    label: str


class Series(NamedTuple):
    name: str
    colour: int
    mark: str
    dashes: int
    """Which pattern the line has; 0 is none."""
    points: list[Point]


class Tick(NamedTuple):
    at: float
    label: str


class Chart(NamedTuple):
    title: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    series: list[Series]


class Scale:
    """From values to places between `start` and `end`; what lies outside is drawn at the edge."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool = False) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end
        self.log = log

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        value = min(max(value, low), high)
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self, label: Callable[[float], str]) -> list[Tick]:
        if self.log:
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [mantissa * 10.0**exponent for exponent in exponents for mantissa in (1, 2, 5)]
        else:
            step = _step(self.high - self.low)
            found = [n * step for n in range(math.ceil(self.low / step - 1e-9), int(self.high / step + 1e-9) + 1)]
        span = 1e-9 * (self.high - self.low)
        return [Tick(self(v), label(v)) for v in found if self.low - span <= v <= self.high + span]


def _step(span: float) -> float:
    """A round number that divides a span into four to nine."""
    size = 10.0 ** math.floor(math.log10(span / 4))
    return next(size * m for m in (1, 2, 5, 10) if span / (size * m) < 9)


def family(name: str) -> str:
    """What settings are called that differ in nothing but a size: the name without a percentage or top-p's number."""
    return re.sub(r" (\d[\d.]*%|(?<=top-p )\d[\d.]*)(?= |,|$)", "", name)


def looks_of(families: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Family -> its colour, which is its method's, and its number among those of that colour: colours alone would not
    tell twenty families apart, and marks alone would not group them."""
    methods = list(dict.fromkeys(name.split(",")[0] for name in families))
    taken = dict.fromkeys(range(COLOURS), 0)
    looks = {}
    for name in families:
        colour = methods.index(name.split(",")[0]) % COLOURS
        looks[name] = colour, taken[colour]
        taken[colour] += 1
    return looks


def chart(
    title: str, families: dict[str, list[Value]], label: Callable[[float], str], *, log: bool = False
) -> Chart:
    """A series for each family, its settings joined from the smallest read to the largest. x is a share of the cache;
    `label` writes a value of y."""
    values = [value for members in families.values() for value in members]
    x = Scale(0.0, 1.0, LEFT, WIDTH - RIGHT)
    y = Scale(*_range(values, log=log), HEIGHT - BOTTOM, TOP, log=log)
    series, looks = [], looks_of(list(families))
    for name, members in families.items():
        points = []
        for value in sorted(members, key=lambda value: value.x):
            low, high = (None, None) if value.interval is None else map(y, value.interval)
            told = f"{value.name}: {label(value.y)}, {value.x:.1%} read"
            if value.entries is not None and f"{value.entries:.1%}" != f"{value.x:.1%}":
                told += f", {value.entries:.1%} of the entries"
            points.append(Point(x(value.x), y(value.y), low, high, told))
        colour, variant = looks[name]
        series.append(Series(name, colour, MARKS[variant % len(MARKS)], variant % DASHES, points))
    return Chart(title, x.ticks(lambda v: f"{v:.0%}"), y.ticks(label), series)


def _range(values: Sequence[Value], *, log: bool) -> tuple[float, float]:
    """Of all values and their intervals, with some room."""
    ends = [end for value in values for end in (value.y, *(value.interval or ()))]
    if log:
        # An interval may reach down to nothing, where a logarithm has no place for it.
        least = min((value.y for value in values if value.y > 0), default=1e-6)
        return max(min((end for end in ends if end > 0), default=least), least / 5) / 2, max([*ends, least]) * 2
    low, high = min([*ends], default=0.0), max([*ends], default=1.0)
    room = 0.06 * (high - low) or 0.01
    return low - room, high + room


def heat_map(rows: Sequence[Sequence[int]]) -> str:
    """A picture of percentages [rows][columns], a pixel each and white where nothing is, as a data URL."""
    # From white by way of blue to a dark violet, in a palette of 101 colours: a pixel's byte is its percentage.
    stops = ((255, 255, 255), (122, 170, 222), (33, 90, 168), (38, 14, 74))
    palette = bytes(_between(stops, percent / 100, channel) for percent in range(101) for channel in range(3))
    pixels = b"".join(b"\0" + bytes(row) for row in rows)  # each line begins with its filter: none
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)
    image = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"PLTE", palette), (b"IDAT", zlib.compress(pixels, 9)), (b"IEND", b""))
    )
    return "data:image/png;base64," + base64.b64encode(image).decode()


def _between(stops: Sequence[tuple[int, int, int]], at: float, channel: int) -> int:
    place = at * (len(stops) - 1)
    first = min(int(place), len(stops) - 2)
    low, high = stops[first][channel], stops[first + 1][channel]
    return round(low + (high - low) * (place - first))
