"""The chart of a lambda path: what an edit does and what it costs, as lambda grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, log10

from fasttrace.report.judged import EDITED, NEIGHBOUR, OTHER, Figure, Judged

WIDTH, HEIGHT, LEFT, RIGHT, TOP, FOOT = 760.0, 300.0, 52.0, 110.0, 14.0, 44.0
_APART = 15.0  # between two names at the right end


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    low: float | None
    high: float | None
    figure: Figure
    lam: float


@dataclass(frozen=True)
class Series:
    name: str
    points: list[Point]
    label_y: float

    @property
    def line(self) -> str:
        return " ".join(f"{p.x:.1f},{p.y:.1f}" for p in self.points)


@dataclass(frozen=True)
class PathChart:
    shares: bool  # percent; else score changes
    series: list[Series]
    xs: list[tuple[float, str]]
    ys: list[tuple[float, str]]
    lams: list[float]
    chosen: float | None  # x of the lambda of the edit itself
    width: float = WIDTH
    height: float = HEIGHT
    right: float = WIDTH - RIGHT
    left: float = LEFT
    top: float = TOP
    bottom: float = HEIGHT - FOOT


def path_chart(path: Sequence[tuple[float, Judged]], lam: float | None = None) -> PathChart | None:
    """UA, IRA and CRA over log lambda; where nothing was classified, score changes. None without
    anything to draw. lam: that of the edit itself."""
    path = sorted(path, key=lambda point: point[0])
    shares = {n.upper(): [(x, getattr(j, n)) for x, j in path] for n in ("ua", "ira", "cra")}
    changes = {
        name: [(x, j.changes.get(role)) for x, j in path]
        for name, role in (("phrase", EDITED), ("neighbours", NEIGHBOUR), ("others", OTHER))
    }
    changes["target"] = [(x, j.target_changes.get(EDITED)) for x, j in path]
    classified = any(f is not None for figures in shares.values() for _, f in figures)
    found = {
        name: [(x, f) for x, f in figures if f is not None]
        for name, figures in (shares if classified else changes).items()
    }
    found = {name: figures for name, figures in found.items() if figures}
    if not found:
        return None
    ends = [v for figures in found.values() for _, f in figures for v in (f.value, f.low, f.high)]
    marks = _marks([v for v in ends if v is not None], classified)
    bottom, top = marks[0], marks[-1]

    def height(value: float | None) -> float | None:
        if value is None:
            return None
        return TOP + (top - value) / (top - bottom) * (HEIGHT - FOOT - TOP)

    places = _places([x for x, _ in path])
    series = []
    for name, figures in found.items():
        points = [
            Point(places[x], height(f.value) or 0.0, height(f.low), height(f.high), f, x)
            for x, f in figures
        ]
        series.append(Series(name, points, 0.0))
    step = -(-len(places) // 12)
    return PathChart(
        classified,
        _spread(series),
        [(place, f"{x:g}") for i, (x, place) in enumerate(places.items()) if i % step == 0],
        [(height(v) or 0.0, f"{v:g}{' %' if classified else ''}") for v in marks],
        list(places),
        None if lam is None else places.get(lam),
    )


def _places(lams: Sequence[float]) -> dict[float, float]:
    """x of each lambda on a logarithmic axis; 0 stands one decade left of the others."""
    positive = [lam for lam in lams if lam > 0]
    least = log10(min(positive)) - 1 if positive else 0.0
    logs = {lam: log10(lam) if lam > 0 else least for lam in lams}
    first, last = min(logs.values()), max(logs.values())
    span = last - first or 1.0
    start = 0.5 if first == last else 0.0
    wide = WIDTH - LEFT - RIGHT - 24
    return {lam: LEFT + 12 + (start + (log - first) / span) * wide for lam, log in logs.items()}


def _marks(values: Sequence[float], percent: bool) -> list[float]:
    """Round numbers around the values and zero."""
    if percent:
        return [0.0, 25.0, 50.0, 75.0, 100.0]
    low, high = min(0.0, *values), max(0.0, *values)
    rough = (high - low) / 4 or 1.0
    size = 10.0 ** floor(log10(rough))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough)
    first, last = floor(low / step), -floor(-high / step)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _spread(series: list[Series]) -> list[Series]:
    """Names beside the lines' right ends, moved apart where they would overlap."""
    ordered = sorted(series, key=lambda s: s.points[-1].y)
    found: dict[str, float] = {}
    last = -_APART
    for s in ordered:
        last = found[s.name] = max(s.points[-1].y, last + _APART)
    over = last - (HEIGHT - FOOT)
    if over > 0:
        found = {name: y - over for name, y in found.items()}
    return [Series(s.name, s.points, found[s.name]) for s in series]
