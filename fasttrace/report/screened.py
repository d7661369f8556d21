"""The page of what `find` found: screened against exact, who won, what may have been missed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttrace.report.names import KIND_WORDS, component_words, words
from fasttrace.report.pages import environment
from fasttrace.store.disk import write_atomic

PAGE = "found.html"
WIDTH, HEIGHT, EDGE = 640.0, 420.0, 12.0
COLOURS = {"resnet": "resnet", "attn1": "self", "attn": "self", "attn2": "cross", "ff": "ff"}
WHY = {
    "always": "checked whatever its score",
    "top": "ranked high",
    "audit": "drawn at random",
}


@dataclass(frozen=True)
class Dot:
    """One checked place. shape: "audit" ones are rings."""

    x: float
    y: float
    colour: str
    why: str
    words: str  # what hovering shows


@dataclass(frozen=True)
class Scatter:
    """Screened to the right, exact upwards, each on its own scale, since first order overshoots.

    lines: (where, text) of the axes' zeros and of the threshold.
    """

    dots: tuple[Dot, ...]
    zero: tuple[float, float]
    threshold: float | None
    ends: tuple[str, str, str, str]  # least and most screened, least and most exact


def scatter(places: Sequence[Mapping[str, Any]], names: Sequence[str], threshold: float) -> Scatter:
    """places: records of `Place`; those without an exact effect are left out."""
    checked = [(p, name) for p, name in zip(places, names, strict=True) if p["exact"] is not None]
    xs = _Scale([p["screened"] for p, _ in checked], EDGE, WIDTH - EDGE)
    ys = _Scale([p["exact"] for p, _ in checked] + [threshold], HEIGHT - EDGE, EDGE)
    dots = tuple(
        Dot(
            xs(p["screened"]),
            ys(p["exact"]),
            colour(p["kind"]),
            p["why"],
            f"{name}: exact {p['exact']:+.3g}, screened {p['screened']:+.3g}; {WHY[p['why']]}",
        )
        for p, name in checked
    )
    ends = (xs.least, xs.most, ys.least, ys.most)
    least, most, low, high = (f"{value:.3g}" for value in ends)
    return Scatter(dots, (xs(0.0), ys(0.0)), ys(threshold), (least, most, low, high))


def colour(kind: str) -> str:
    return COLOURS.get(kind, "other")


def render_found(record: Mapping[str, Any]) -> str:
    """record: what `Found.record` gives. Everything that comes from outside is escaped."""
    places = list(zip(record["places"], record["names"], strict=True))
    winners = [
        (p, name)
        for p, name in places
        if p["exact"] is not None and p["exact"] >= record["threshold"]
    ]
    winners.sort(key=lambda one: -one[0]["exact"])
    kinds = list(dict.fromkeys(p["kind"] for p, _ in places if p["exact"] is not None))
    return (
        environment()
        .get_template("found.html.j2")
        .render(
            found=record,
            component=component_words(record["component"]),
            chart=scatter(record["places"], record["names"], record["threshold"]),
            width=WIDTH,
            height=HEIGHT,
            winners=winners,
            kinds=[(colour(kind), KIND_WORDS.get(kind, kind)) for kind in kinds],
            correlations={
                KIND_WORDS.get(name, name): rho
                for name, rho in record["correlations"].items()
                if rho is not None
            },
            inside=[
                (f"{words(p['site'], p['kind'])}, {_numbered(p['axis'], p['coordinates'])}", p)
                for p in record["finer"]
            ],
            why=WHY,
        )
    )


def write_found_page(record: Mapping[str, Any], folder: str | Path) -> Path:
    """Its path."""
    file = Path(folder) / PAGE
    write_atomic(file, render_found(record).encode())
    return file


def _numbered(axis: str, coordinates: Sequence[int]) -> str:
    return f"{axis}{'s' * (len(coordinates) > 1)} {', '.join(map(str, coordinates))}"


class _Scale:
    """Values, and 0, to places between two ends."""

    def __init__(self, values: Sequence[float], start: float, stop: float) -> None:
        self.least, self.most = min([0.0, *values]), max([0.0, *values])
        self.start, self.stop = start, stop

    def __call__(self, value: float) -> float:
        span = (self.most - self.least) or 1.0
        return self.start + (value - self.least) / span * (self.stop - self.start)
