"""At which runs gradients are taken, and how they are put together into scores.

Plain: at the corrupt run. Averaged: at runs whose text lies between the corrupt and the clean one.
Integrated: at corrupt runs in which the very place that is scored is patched at a strength between
0 and 1; this is exact in the limit of many points, and costs a run a place and point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fasttrace.errors import UsageError

RULES = ("even", "middle", "gauss")
NAMES = ("plain", "averaged", "averaged:<points>", "integrated:<points>", "joint:<points>")
KEYS = "+keys"


@dataclass(frozen=True)
class Base:
    """A run at which gradients are taken.

    text: 0 is the corrupt text, 1 the clean one, between them lies the straight line. patched:
    places that take the clean run's activation at `strength`. weight: of its gradients. counts: the
    places it is there for; None is all. channels: of each patched place, those that take it; none
    given is all.
    """

    text: float = 0.0
    patched: tuple[str, ...] = ()
    strength: float = 0.0
    weight: float = 1.0
    counts: tuple[str, ...] | None = None
    channels: tuple[tuple[int, ...], ...] = ()

    @property
    def run(self) -> str | None:
        """Which run it is anyhow."""
        if self.patched:
            return None
        return {0.0: "corrupt", 1.0: "clean"}.get(self.text)


class Estimator(Protocol):
    """exact_keys: swapped keys of cross-attentions go through the softmax, not along its slope.

    difference: "own" is clean - the run's own activation, as the slope in a strength has it;
    "corrupt" is clean - corrupt whatever the run.
    """

    @property
    def name(self) -> str: ...
    @property
    def exact_keys(self) -> bool: ...
    @property
    def difference(self) -> str: ...
    @property
    def of_text(self) -> bool:
        """Whether it says something of texts."""
        ...

    def bases(self, places: Sequence[str]) -> list[Base]:
        """places: names of marks that are scored."""
        ...


@dataclass(frozen=True)
class Plain:
    """The slope at the corrupt run: <clean - corrupt, dM/d activation>."""

    exact_keys: bool = False
    difference = "own"
    of_text = True

    @property
    def name(self) -> str:
        return "plain" + KEYS * self.exact_keys

    def bases(self, places: Sequence[str]) -> list[Base]:
        return [Base()]


@dataclass(frozen=True)
class Averaged:
    """The mean of the gradients at `points` texts from the corrupt to the clean one.

    rule: "even" begins at the corrupt text and leaves the clean one out (0, 1/3, 2/3), where a
    distance to the clean run has no gradient; "middle" takes the middles of equal parts; "gauss"
    are Gauss-Legendre points, the best for the integral along the line.
    """

    points: int = 3
    rule: str = "even"
    exact_keys: bool = False
    difference = "corrupt"
    of_text = True

    def __post_init__(self) -> None:
        _nodes(self.points, self.rule)

    @property
    def name(self) -> str:
        own = "" if self.rule == "even" else f":{self.rule}"
        return f"averaged:{self.points}{own}" + KEYS * self.exact_keys

    def bases(self, places: Sequence[str]) -> list[Base]:
        return [Base(text=x, weight=w) for x, w in _nodes(self.points, self.rule)]


@dataclass(frozen=True)
class Integrated:
    """The slope averaged over strengths of the patch itself, Gauss-Legendre points in (0, 1).

    Over all calls this is the effect of the exact patch, up to the rule's own error. joint: all
    places are patched together, so that over a full cut the scores sum to clean - corrupt.
    """

    points: int = 4
    joint: bool = False
    exact_keys: bool = False
    difference = "own"
    of_text = False

    def __post_init__(self) -> None:
        _nodes(self.points, "gauss")

    @property
    def name(self) -> str:
        return f"{'joint' if self.joint else 'integrated'}:{self.points}"

    def bases(self, places: Sequence[str]) -> list[Base]:
        groups = [tuple(places)] if self.joint else [(place,) for place in places]
        nodes = _nodes(self.points, "gauss")
        return [Base(0.0, group, x, w, group) for group in groups for x, w in nodes]


def parse_estimator(asked: str | Estimator) -> Estimator:
    """ "plain", "averaged:5", "averaged:5:gauss", "integrated:4", "joint:8"; "+keys" behind it.

    Raises `UsageError` for what is none of them.
    """
    if not isinstance(asked, str):
        return asked
    words, plus, rest = asked.partition(KEYS)
    name, *options = words.split(":")
    if not (plus and rest) and (not options or options[0].isdecimal()) and len(options) <= 2:
        points = int(options[0]) if options else None
        keys = bool(plus)
        if name == "plain" and not options:
            return Plain(keys)
        if name == "averaged":
            rule = options[1] if len(options) == 2 else "even"
            return Averaged(3 if points is None else points, rule, keys)
        if name in ("integrated", "joint") and len(options) < 2 and not keys:
            return Integrated(4 if points is None else points, name == "joint")
    raise UsageError(
        f"Unknown estimator {asked!r}; expected one of {', '.join(NAMES)}, the first two also with "
        f"'{KEYS}'."
    )


def _nodes(points: int, rule: str) -> list[tuple[float, float]]:
    """Points in [0, 1] and weights that sum to 1."""
    if rule not in RULES:
        raise UsageError(f"Unknown rule {rule!r}; expected one of {', '.join(RULES)}.")
    if isinstance(points, bool) or not isinstance(points, int) or not 1 <= points <= 64:
        raise UsageError(f"An estimator takes 1 to 64 points, not {points!r}.")
    if rule == "gauss":
        nodes, weights = np.polynomial.legendre.leggauss(points)
        return [(float(x), float(w)) for x, w in zip((nodes + 1) / 2, weights / 2, strict=True)]
    shift = 0.5 if rule == "middle" else 0.0
    return [((i + shift) / points, 1 / points) for i in range(points)]
