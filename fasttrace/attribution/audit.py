"""What a screen may have missed, bounded from a random sample that was checked exactly.

Of R places that nobody checked, D would be found above the threshold; D is unknown. A simple random
sample of n of them is checked and h are above. The number of hits is then hypergeometric, and the
largest D under which h or fewer hits still have a chance of more than 1 - confidence is an upper
bound on D: it is below the true number in at most 1 - confidence of all audits, whatever the
effects look like. (The one-sided exact bound of Clopper and Pearson 1934, for a finite population:
Buonaccorsi, Biometrics 43, 1987. Whole numbers throughout, so nothing is approximated.)
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import comb

from fasttrace.errors import UsageError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Audit:
    """The audit of one screen.

    population: places that were not verified. sample: how many of them were drawn and checked.
    above: how many of those turned out to be above the threshold. bound: no more than so many of
    the whole population are, with `confidence`; `left` of them may still be undiscovered.
    """

    population: int
    sample: int
    above: int
    bound: int
    confidence: float = CONFIDENCE

    @property
    def left(self) -> int:
        return self.bound - self.above

    def __str__(self) -> str:
        if not self.population:
            return "Every place was checked exactly, so none can have been missed."
        if self.sample == self.population:
            one = self.population == 1
            return (
                f"{'The one place' if one else f'All {self.population} places'} below the verified "
                f"ones {'was' if one else 'were'} checked as well: {self.above} above the "
                "threshold, none left to miss."
            )
        if not self.sample:
            return (
                f"Nothing was audited, so nothing is known of the {self.population} places that "
                "were not checked."
            )
        return (
            f"{self.sample} of the {self.population} places that the screen ranked lower were "
            f"drawn at random and checked exactly: {self.above} above the threshold. So with "
            f"{100 * self.confidence:g} % confidence the screen left out at most {self.bound} of "
            f"the {self.population}, of which at most {self.left} are still unknown."
        )


def audit(population: int, sample: int, above: int, confidence: float = CONFIDENCE) -> Audit:
    """Raises `UsageError` for numbers that can't be those of a sample."""
    bound = most_above(population, sample, above, confidence)
    return Audit(population, sample, above, bound, confidence)


def most_above(population: int, sample: int, above: int, confidence: float = CONFIDENCE) -> int:
    """The largest number above the threshold that a population may hold.

    population: R >= 0. sample: n <= R drawn without replacement. above: h <= n of them above.
    """
    if not 0 <= above <= sample <= population:
        raise UsageError(
            f"A sample of {sample} with {above} above the threshold can't come from {population} "
            "places."
        )
    if not 0 < confidence < 1:
        raise UsageError(f"A confidence lies between 0 and 1, and {confidence!r} doesn't.")
    risk = 1 - Fraction(str(confidence))
    every = comb(population, sample)
    low, high = above, population - (sample - above)  # the first is possible for sure
    while low < high:
        middle = (low + high + 1) // 2
        if Fraction(_ways(population, middle, sample, above), every) > risk:
            low = middle
        else:
            high = middle - 1
    return low


def _ways(population: int, marked: int, sample: int, most: int) -> int:
    """Samples with at most `most` of the `marked` ones in them."""
    rest = population - marked
    return sum(
        comb(marked, k) * comb(rest, sample - k)
        for k in range(max(0, sample - rest), min(most, marked, sample) + 1)
    )


def draw(names: Sequence[str], count: int, seed: int) -> list[str]:
    """A simple random sample without replacement, in the order given; all where there are fewer.

    The same for the same names in the same order, whatever the machine.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise UsageError(f"An audit checks a whole number of places of 0 or more, not {count!r}.")
    if count >= len(names):
        return list(names)
    chosen = sorted(random.Random(seed).sample(range(len(names)), count))
    return [names[i] for i in chosen]
