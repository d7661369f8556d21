"""Geometry of the page's charts, in SVG units; colours are CSS classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from fasttrace.profile.instrument import CACHE, GUIDED, STEP, TABLES, TEXT
from fasttrace.profile.records import Alive, Line, Profile
from fasttrace.profile.sites import JOINS, OTHER
from fasttrace.profile.words import kind_name, percent, scaled, seconds

WIDTH = 1000.0
_MOST_POINTS = 800  # of a line: more than there are pixels
_COLOURS = {
    "resnet": "resnet", "attn1": "self", "attn2": "cross", "ff": "ff", OTHER: "other",
    JOINS: "joins", TABLES: "tables", GUIDED: "guided", CACHE: "tables", TEXT: "once", STEP: "once",
    "text encoder": "encoder", "VAE": "vae",
}  # fmt: skip


@dataclass(frozen=True)
class Bar:
    x: float
    y: float
    w: float
    h: float
    colour: str
    words: str  # what hovering shows


@dataclass(frozen=True)
class Tick:
    y: float
    text: str


@dataclass(frozen=True)
class Chart:
    height: float
    bars: tuple[Bar, ...] = ()
    marks: tuple[Bar, ...] = ()
    points: str = ""
    ticks: tuple[Tick, ...] = ()
    width: float = WIDTH


def colour(kind: str) -> str:
    return _COLOURS.get(kind, "metric" if kind.startswith("metric") else "rest")


def stripe(lines: Sequence[Line]) -> Chart:
    """All of the time in one bar."""
    x, bars = 0.0, []
    for line in lines:
        width = WIDTH * max(0.0, line.share)
        words = f"{kind_name(line.name)}: {percent(line.share)}, {seconds(line.seconds)}"
        bars.append(Bar(x, 0, width, 34, colour(line.name), words))
        x += width
    return Chart(34, tuple(bars))


def sites(found: Profile) -> Chart | None:
    """A bar a site: milliseconds a step; in it a mark at the time of the machine's ceilings."""
    lines = [line for line in found.sites if line.calls]
    if not lines:
        return None
    each = [line.seconds / line.calls for line in lines]
    top, height = max(each), 190.0
    room = WIDTH / len(lines)
    bars, marks = [], []
    for i, (line, took) in enumerate(zip(lines, each, strict=True)):
        share, binds = found.of_ceiling(line) or (0.0, "")
        tall = height * took / top
        words = (
            f"{line.site}\n{seconds(took)} a step, {percent(line.share)} of the time\n"
            f"{scaled(line.flop_rate or 0, 'FLOP/s')}, {scaled(line.byte_rate or 0, 'B/s')}\n"
            f"at the ceilings {percent(share)} of it ({binds})"
        )
        x, wide = i * room, room * 0.82
        bars.append(Bar(x, height - tall, wide, tall, colour(line.name), words))
        least = min(height, tall * share)
        marks.append(Bar(x, height - least, wide, 2.2, "mark", words))
    return Chart(height, tuple(bars), tuple(marks), ticks=_ticks(top, height, "s"))


def memory(found: Profile) -> Chart | None:
    """Bytes in use after each step."""
    if len(found.memory) < 2:
        return None
    height, last = 130.0, found.memory[-1][0]
    first = found.memory[0][0]
    top = max(size for _, size in found.memory)
    every = max(1, len(found.memory) // _MOST_POINTS)
    points = [
        f"{WIDTH * (at - first) / max(1, last - first):.1f},{height * (1 - size / top):.1f}"
        for at, size in found.memory[::every]
    ]
    return Chart(height, points=" ".join(points), ticks=_ticks(top, height, "B"))


def alive(found: Alive | None) -> Chart | None:
    """Bytes of a step's own tensors, operator by operator, in the colour of the site at work."""
    if found is None or not found.bytes:
        return None
    height, top = 130.0, max(1, *found.bytes)
    room = WIDTH / len(found.bytes)
    bars = []
    edges = [0, *(i for i, (a, b) in enumerate(pairwise(_places(found)), 1) if a != b)]
    for start, stop in pairwise([*edges, len(found.bytes)]):
        most = max(found.bytes[start:stop])
        tall = height * most / top
        where = found.sites[start] or kind_name(found.kinds[start])
        words = f"{where}\n{scaled(most, 'B')} alive at most"
        bars.append(
            Bar(start * room, height - tall, (stop - start) * room, tall,
                colour(found.kinds[start]), words)
        )  # fmt: skip
    return Chart(height, tuple(bars), ticks=_ticks(top, height, "B"))


def _places(found: Alive) -> list[tuple[str, str]]:
    return list(zip(found.kinds, found.sites, strict=True))


def _ticks(top: float, height: float, unit: str) -> tuple[Tick, ...]:
    name = seconds if unit == "s" else lambda number: scaled(number, unit)
    return tuple(Tick(height * (1 - share), name(top * share)) for share in (0.5, 1.0))
