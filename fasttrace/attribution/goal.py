"""What an adaptive sweep is to settle: the top so many of its places, and how surely."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fasttrace.errors import UsageError

CONFIDENCE = 0.95
_UNTIL = re.compile(r"top\s*(\d+(?:\.\d+)?)(%?)(?:@(\d+(?:\.\d+)?)%?)?")


@dataclass(frozen=True)
class Goal:
    """So many arms at the top, or such a share of all (rounded, at least one)."""

    number: float
    of_hundred: bool
    confidence: float = CONFIDENCE

    def count(self, arms: int) -> int:
        """Raises `UsageError` where that is all of them, or none."""
        top = max(1, round(arms * self.number / 100)) if self.of_hundred else int(self.number)
        if not 1 <= top < arms:
            raise UsageError(f"The top {self} of {arms} places is no choice among them.")
        return top

    @property
    def text(self) -> str:
        """As `parse_goal` reads it."""
        return f"top{self.number:g}{'%' * self.of_hundred}@{100 * self.confidence:g}"

    def __str__(self) -> str:
        return f"{self.number:g}{' %' * self.of_hundred}"


def parse_goal(text: str) -> Goal:
    """ "top10%@95" is a tenth of the sites with 95 % confidence; "top5" five, with 95 %."""
    found = _UNTIL.fullmatch(text.strip()) if isinstance(text, str) else None
    if found:
        number, percent = float(found[1]), bool(found[2])
        confidence = CONFIDENCE if found[3] is None else float(found[3]) / 100
        fits = number < 100 if percent else number == int(number)
        if number > 0 and fits and 0.5 <= confidence < 1:
            return Goal(number, percent, confidence)
    raise UsageError(
        f"{text!r} can't be read: expected such as top10%@95, the top tenth of the sites with 95 % "
        "confidence, or top5@95, the top five. Confidence is from 50 to below 100."
    )
