"""At which runs gradients are taken, and how they are put together into scores.

Plain: at the corrupt run. Averaged: at runs whose text lies between the corrupt and the clean one.
Nudged: at the corrupt run and at one in which all that adds to the stream is patched a little,
which is nearer to what a whole patch meets. Integrated: at corrupt runs in which the very place
that is scored is patched at a strength between 0 and 1; this is exact in the limit of many points,
and costs a run a place and point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Protocol

import numpy as np

from fasttrace.errors import UsageError
from fasttrace.plan.windows import Window

RULES = ("even", "middle", "gauss")
NAMES = (
    "plain",
    "nudged[:<strength>]",
    f"averaged[:<points>[:{'|'.join(RULES)}]]",
    "integrated[:<points>]",
    "joint[:<points>]",
)
NUDGE = 0.1
KEYS = "+keys"


@dataclass(frozen=True)
class Base:
    """A run at which gradients are taken.

    text: 0 is the corrupt text, 1 the clean one, between them lies the straight line. patched:
    places that take the clean run's activation at `strength`. weight: of its gradients. counts: the
    places it is there for; None is all. channels: of each patched place, those that take it; none
    given is all. window: calls in which they do; None is all.
    """

    text: float = 0.0
    patched: tuple[str, ...] = ()
    strength: float = 0.0
    weight: float = 1.0
    counts: tuple[str, ...] | None = None
    channels: tuple[tuple[int, ...], ...] = ()
    window: Window | None = None

    def acts(self, call: int) -> bool:
        return self.window is None or self.window[0] <= call < self.window[1]

    @property
    def run(self) -> str | None:
        """Which run it is anyhow."""
        if self.patched:
            return None
        return {0.0: "corrupt", 1.0: "clean"}.get(self.text)


class Estimator(Protocol):
    """exact_keys: swapped keys of cross-attentions go through the softmax, not along its slope.
    of_patches: scores are of patches in one window, which other windows say nothing about; they are
    of no text. Else a window is the sum of its calls.

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
    def of_patches(self) -> bool: ...

    def bases(self, places: Sequence[str], added: Sequence[str]) -> list[Base]:
        """places: names of marks that are scored. added: of the outputs of attentions and
        feed-forwards, which add to the stream."""
        ...


@dataclass(frozen=True)
class Plain:
    """The slope at the corrupt run: <clean - corrupt, dM/d activation>."""

    exact_keys: bool = False
    difference = "own"
    of_patches = False

    @property
    def name(self) -> str:
        return "plain" + KEYS * self.exact_keys

    def bases(self, places: Sequence[str], added: Sequence[str]) -> list[Base]:
        return [Base()]


@dataclass(frozen=True)
class Nudged:
    """The mean of the slopes at the corrupt run and at a nudged one, in which every attention and
    feed-forward takes a little of the clean run's output, in all calls.

    strength: how much of it. A whole patch moves what lies behind it, and the second run has moved
    a little of the way; ResNets replace the stream and would move all of it.
    """

    strength: float = NUDGE
    exact_keys: bool = False
    difference = "own"
    of_patches = False

    def __post_init__(self) -> None:
        if not (isfinite(self.strength) and 0 < self.strength <= 1):
            raise UsageError(f"A nudge's strength is above 0 and at most 1, not {self.strength!r}.")

    @property
    def name(self) -> str:
        own = "" if self.strength == NUDGE else f":{self.strength:g}"
        return f"nudged{own}" + KEYS * self.exact_keys

    def bases(self, places: Sequence[str], added: Sequence[str]) -> list[Base]:
        return [Base(weight=0.5), Base(patched=tuple(added), strength=self.strength, weight=0.5)]


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
    of_patches = False

    def __post_init__(self) -> None:
        _nodes(self.points, self.rule)

    @property
    def name(self) -> str:
        own = "" if self.rule == "even" else f":{self.rule}"
        return f"averaged:{self.points}{own}" + KEYS * self.exact_keys

    def bases(self, places: Sequence[str], added: Sequence[str]) -> list[Base]:
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
    of_patches = True

    def __post_init__(self) -> None:
        _nodes(self.points, "gauss")

    @property
    def name(self) -> str:
        return f"{'joint' if self.joint else 'integrated'}:{self.points}"

    def bases(self, places: Sequence[str], added: Sequence[str]) -> list[Base]:
        groups = [tuple(places)] if self.joint else [(place,) for place in places]
        nodes = _nodes(self.points, "gauss")
        return [Base(0.0, group, x, w, group) for group in groups for x, w in nodes]


def parse_estimator(asked: str | Estimator) -> Estimator:
    """ "plain", "nudged", "averaged:5", "averaged:5:gauss", "integrated:4", "joint:8"; "+keys".

    Raises `UsageError` for what is none of them.
    """
    if not isinstance(asked, str):
        if all(hasattr(asked, name) for name in ("name", "bases", "difference", "of_patches")):
            return asked
        raise _unknown(asked)
    words, plus, rest = asked.partition(KEYS)
    name, *options = words.split(":")
    keys = bool(plus)
    if rest or len(options) > (2 if name == "averaged" else name != "plain"):
        raise _unknown(asked)
    try:
        number = float(options[0]) if options else None
    except ValueError:
        raise _unknown(asked) from None
    if name == "plain":
        return Plain(keys)
    if name == "nudged":
        return Nudged(NUDGE if number is None else number, keys)
    if number is not None and not number.is_integer():
        raise _unknown(asked)
    points = None if number is None else int(number)
    if name == "averaged":
        rule = options[1] if len(options) == 2 else "even"
        return Averaged(3 if points is None else points, rule, keys)
    if name in ("integrated", "joint") and not keys:
        return Integrated(4 if points is None else points, name == "joint")
    raise _unknown(asked)


def _unknown(asked: object) -> UsageError:
    return UsageError(
        f"Unknown estimator {asked!r}; expected one of {', '.join(NAMES)}, the first three also "
        f"with '{KEYS}'."
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
