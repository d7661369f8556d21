"""Pictures of an evaluation, paired: unedited above, edited below; damage first."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, isnan
from pathlib import Path

from PIL import Image

from fasttrace.report.images import data_uri
from fasttrace.report.judged import UNTOUCHED
from fasttrace.store.pictures import open_picture
from fasttrace.types import Judgement

_log = logging.getLogger(__name__)
MOST, SIDE = 12, 128
# Of many edits fewer and smaller pictures: the page stays one that a browser opens at once.
MANY, FEWER, SMALLER = 8, 6, 96


@dataclass(frozen=True)
class Pair:
    """One question's pictures. whole: both in one; else before and after, None where missing."""

    row: Judgement
    whole: str | None
    before: str | None
    after: str | None
    note: str  # which classes changed, or that the phrase is still shown
    bad: bool  # whether it shows that the edit failed or did damage


@dataclass(frozen=True)
class PairGroup:
    role: str
    pairs: list[Pair]
    total: int


@dataclass
class Album:
    """Reads pictures; counts those it could not show."""

    folder: Path
    many: bool
    missing: int = 0
    damaged: dict[str, str] = field(default_factory=dict)

    def groups(self, rows: Sequence[Judgement]) -> list[PairGroup]:
        """By role, in the rows' order; what was not to change begins with the worst."""
        found = []
        most = FEWER if self.many else MOST
        for role in dict.fromkeys(r.role for r in rows):
            own = [r for r in rows if r.role == role]
            if role in UNTOUCHED:
                own.sort(key=_harm, reverse=True)
            found.append(PairGroup(role, [self._pair(r) for r in own[:most]], len(own)))
        return found

    def warn_of_damage(self) -> None:
        """One warning for all damaged pictures, however many."""
        if self.damaged:
            first = next(iter(self.damaged.values()))
            _log.warning("going on without %d damaged pictures; one: %s", len(self.damaged), first)

    def _pair(self, row: Judgement) -> Pair:
        before, after = (self._open(name) for name in (row.picture_before, row.picture_after))
        note, bad = describe(row)
        side = SMALLER if self.many else SIDE
        if before is not None and after is not None:
            return Pair(
                row, data_uri(_stacked(before, after, side), 2 * side), None, None, note, bad
            )
        uris = [None if image is None else data_uri(image, side) for image in (before, after)]
        return Pair(row, None, uris[0], uris[1], note, bad)

    def _open(self, name: str | None) -> Image.Image | None:
        found = None if name is None else open_picture(self.folder, name, self.damaged)
        self.missing += found is None
        return found


def describe(row: Judgement) -> tuple[str, bool]:
    """What the classifiers say of the pair, and whether that is bad news."""
    before, after = json.loads(row.shown_before), json.loads(row.shown_after)
    expected = json.loads(row.expected)
    moved = [name for name in after if name in before and before[name] != after[name]]
    words = [f"{name}: {before[name]}, now {after[name]}" for name in moved]
    if row.role in UNTOUCHED:
        return "; ".join(words), any(expected.get(name) == before[name] for name in moved)
    wanted = expected.get(row.attribute)
    still = wanted is not None and after[row.attribute] == wanted
    if still:
        words.insert(0, f"still shows {wanted}")
    lost = any(expected.get(name) == before[name] for name in moved if name != row.attribute)
    return "; ".join(words), still or lost


def _harm(row: Judgement) -> tuple[int, int, float]:
    """Classes lost that the prompt names, classes moved at all, how far the score fell."""
    before, after = json.loads(row.shown_before), json.loads(row.shown_after)
    moved = [name for name in after if before.get(name) != after[name]]
    expected = json.loads(row.expected)
    lost = [name for name in moved if name in expected and before.get(name) == expected[name]]
    fall = row.before - row.after
    return len(lost), len(moved), inf if isnan(fall) else fall


def _stacked(before: Image.Image, after: Image.Image, side: int) -> Image.Image:
    """One above the other, each at most `side` pixels."""
    both = [image.convert("RGB") for image in (before, after)]
    for image in both:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    width, height = (max(i.size[axis] for i in both) for axis in (0, 1))
    canvas = Image.new("RGB", (width, 2 * height))
    for number, image in enumerate(both):
        canvas.paste(image, (0, number * height))
    return canvas
