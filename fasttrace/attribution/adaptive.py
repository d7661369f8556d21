"""Which sites are the top ones, from as few exact runs as settle it. Statistics alone.

Sites are arms. Pairs (probe, seed) are pulls: they come in one random order, the same for all arms
(common random numbers), so arms are compared on paired differences. After 5, 8, 12, 18, ... pairs
there is a look: an arm that is surely worse than as many others as there are places leaves, one
that is surely better than all but as many is in, and the rest go on (racing with accepts and
rejects: Maron and Moore, NIPS 1993; Bubeck, Wang and Viswanathan, ICML 2013; in batches that grow
as in sequential halving, Karnin, Koren and Somekh, ICML 2013).

What is settled is the top set over *all N pairs*, as an exhaustive sweep would give it. After n of
them, drawn without replacement, the difference of two arms over all N lies above

    mean(d) - t(1 - risk, n - 1) * sd(d) * sqrt((1 - n / N) / n)

but for a chance of `risk` (Student's t with the finite population correction: Cochran, Sampling
Techniques, 1977, sections 2.6 and 2.8); at n = N nothing is left open. A wrong set needs an arm
outside the true top m to be called better than one inside, at some look. There are m (K - m) such
comparisons at each of L looks. A fifth of what may go wrong is shared out among all of these
(Bonferroni), and settles what is clear; the other four fifths, look by look, only among those
between arms that are still open, since the settled ones can't mislead any more (two steps, as in
Romano, Shaikh and Wolf, Econometrica 82, 2014). So the whole set, over all looks and wherever it
stops, is wrong with a chance of about 1 - confidence at most. This is for differences that are
roughly normal: where a site acts in few pairs and not at all in the others, five pairs may not show
it. Tests and `bench/adaptive.py` count how often sets come out right.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Generic, Literal, TypeVar

import numpy as np

from fasttrace.attribution.goal import CONFIDENCE
from fasttrace.attribution.student import quantile
from fasttrace.errors import UsageError

FIRST, GROWTH = 5, 1.5
CLEAR = 0.2  # of the risk, for what is clear without knowing which arms matter
BESIDE = 2  # the clean and the corrupt run that every pair needs
LEAST = 3  # pairs that count, below which a look says nothing

Arm = TypeVar("Arm", bound=Hashable)
State = Literal["in", "out", "open"]
Why = Literal["settled", "every pair", "budget", "nothing", "under way"]


@dataclass(frozen=True)
class Ask(Generic[Arm]):
    """What is to be run next: these arms for each of these pairs (places in the order)."""

    arms: tuple[Arm, ...]
    pairs: range


@dataclass(frozen=True)
class Standing(Generic[Arm]):
    """One arm. effect: its mean over the `pairs` it was run for. lead: how far it is ahead of the
    arm that it has to beat (best of those outside, or last of those inside), over the pairs that
    both were run for, give or take `half`; infinite before the first look."""

    arm: Arm
    state: State
    pairs: int
    effect: float
    lead: float
    half: float


@dataclass(frozen=True)
class Settled(Generic[Arm]):
    """What is known by now.

    top: the arms of the top set, best first; a guess where `settled` is false. standings: of every
    arm, best first. spent, exhaustive: runs, clean and corrupt ones included. visited: pairs looked
    at; counted: those that have something to restore.
    """

    top: tuple[Arm, ...]
    settled: bool
    why: Why
    standings: tuple[Standing[Arm], ...]
    confidence: float
    pairs: int
    visited: int
    counted: int
    looks: int
    spent: int
    exhaustive: int

    @property
    def share(self) -> float:
        """Of the runs of an exhaustive sweep."""
        return self.spent / self.exhaustive

    @property
    def open(self) -> tuple[Arm, ...]:
        return tuple(s.arm for s in self.standings if s.state == "open")

    def __str__(self) -> str:
        sure = f"{100 * self.confidence:g} % confidence"
        cost = f"{self.spent} of {self.exhaustive} runs ({100 * self.share:.0f} %)"
        places = f"the top {len(self.top)}" if len(self.top) > 1 else "the top place"
        if self.why == "nothing":
            return f"None of the {self.pairs} pairs has anything to restore, so no site is causal."
        if self.why == "every pair":
            return (
                f"All {self.pairs} pairs were needed for {places} of {len(self.standings)}: "
                f"{cost}. What stayed open to the end is exact; what was settled before is so with "
                f"{sure}."
            )
        if self.settled:
            return (
                f"Settled with {sure}: {places} of {len(self.standings)}, after {self.visited} of "
                f"{self.pairs} pairs and {cost}."
            )
        inside = sum(s.state == "in" for s in self.standings)
        end = "The budget is spent" if self.why == "budget" else "Not settled yet"
        return (
            f"{end} ({cost}, {self.visited} of {self.pairs} pairs): with {sure} {inside} of "
            f"{places} are known, and {len(self.open)} sites are left for the other "
            f"{len(self.top) - inside}."
        )


class Race(Generic[Arm]):
    """Asks for pulls and decides. The same effects lead to the same decisions.

    arms: K of them. top: m < K places. pairs: N pulls there are. costs: runs an arm's pull takes, 1
    unless given (0 for what needs none). budget: the most runs. noise: a score's own, below which
    differences of effects mean nothing. first, growth: pairs of the first look, and how they grow.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        top: int,
        pairs: int,
        *,
        confidence: float = CONFIDENCE,
        budget: int | None = None,
        costs: Mapping[Arm, int] | None = None,
        noise: float = 0.0,
        first: int = FIRST,
        growth: float = GROWTH,
    ) -> None:
        if len(set(arms)) != len(arms) or not 1 <= top < len(arms):
            raise UsageError(
                f"A race is for 1 to {len(arms) - 1} of {len(arms)} places, not {top}."
            )
        if pairs < 1 or not 0 < confidence < 1:
            raise UsageError("A race has at least one pair and a confidence between 0 and 1.")
        if budget is not None and budget < 1:
            raise UsageError(f"A budget of {budget} runs allows none; give 1 or more.")
        self.arms, self.places, self.pairs = list(arms), top, pairs
        self.confidence, self.budget, self.noise = confidence, budget, noise
        self.costs = {arm: 1 if costs is None else costs[arm] for arm in arms}
        self.looks = looks(pairs, first, growth)
        self.risk = (1 - confidence) / max(1, len(self.looks))  # of one look
        self.states: dict[Arm, State] = dict.fromkeys(arms, "open")
        self.effects: list[Mapping[Arm, float] | None] = []  # of pairs in order, None: not counted
        self.leads: dict[Arm, tuple[float, float]] = {}
        self.spent = self.looked = 0
        self._out_of_budget = False

    # ---- what is asked and told

    @property
    def open(self) -> list[Arm]:
        return [arm for arm in self.arms if self.states[arm] == "open"]

    @property
    def done(self) -> bool:
        return not self.open or len(self.effects) == self.pairs or self._out_of_budget

    def wanted(self) -> Ask[Arm] | None:
        """The pulls up to the next look, fewer where the budget ends; None where it is over."""
        if self.done:
            return None
        begin = len(self.effects)
        stop = next((look for look in self.looks if look > begin), self.pairs)
        if self.budget is not None:
            fits = (self.budget - self.spent) // self.cost_of_a_pair()
            if fits < 1:
                self._out_of_budget = True
                return None
            stop = min(stop, begin + fits)
        return Ask(tuple(self.open), range(begin, stop))

    def cost_of_a_pair(self) -> int:
        """Runs that the next pair takes."""
        return BESIDE + sum(self.costs[arm] for arm in self.open)

    def tell(self, effects: Mapping[Arm, float] | None) -> None:
        """Effects of all open arms for the next pair; None for one that has nothing to restore."""
        if self.done:
            raise ValueError("the race is over")
        if effects is not None:
            missing = [arm for arm in self.open if arm not in effects]
            if missing:
                raise ValueError(f"{missing[0]!r} is open and has no effect")
            effects = {arm: float(effects[arm]) for arm in self.open}
        self.spent += self.cost_of_a_pair()
        self.effects.append(effects)
        if len(self.effects) == self.pairs:
            self._close()
        elif len(self.effects) in self.looks:
            self._look()

    # ---- decisions

    def _look(self) -> None:
        self.looked += 1
        every = self.places * (len(self.arms) - self.places)
        self._decide(CLEAR * self.risk / every)
        need = self.places - self._inside()
        if self.open:
            self._decide((1 - CLEAR) * self.risk / (need * (len(self.open) - need)))

    def _decide(self, risk: float) -> None:
        """risk: of one comparison."""
        arms, values = self._table()
        counted = len(values)
        if counted < LEAST:
            return
        left = self.pairs - len(self.effects)  # as if they all counted: wider, never narrower
        need = self.places - self._inside()
        means = values.mean(0)
        covariance = np.atleast_2d(np.cov(values.T))
        own = covariance.diagonal()
        spread = np.maximum(own[:, None] + own[None, :] - 2 * covariance, self.noise**2)
        half = np.sqrt(spread * left / (counted + left) / counted)
        half *= quantile(risk, counted - 1)
        difference = means[:, None] - means[None, :]
        better = (difference > half) & (difference > 0)
        np.fill_diagonal(better, False)
        order = np.argsort(-means, kind="stable").tolist()
        for place, i in enumerate(order):
            rival = order[need] if place < need else order[need - 1]
            self.leads[arms[i]] = float(difference[i, rival]), float(half[i, rival])
            if better[:, i].sum() >= need:
                self.states[arms[i]] = "out"
            elif better[i].sum() >= len(arms) - need:
                self.states[arms[i]] = "in"
        # Where the places, or the arms, have run out, the rest is settled as well.
        need, rest = self.places - self._inside(), self.open
        if need == 0 or need == len(rest):
            self.states |= dict.fromkeys(rest, "out" if need == 0 else "in")

    def _close(self) -> None:
        """Every pair has been run for what is open: nothing is estimated any more."""
        arms, values = self._table()
        if not len(values):
            return
        need = self.places - self._inside()
        means = values.mean(0)
        order = np.argsort(-means, kind="stable").tolist()
        for place, i in enumerate(order):
            self.states[arms[i]] = "in" if place < need else "out"
            rival = order[need] if place < need else order[need - 1]
            self.leads[arms[i]] = float(means[i] - means[rival]), 0.0

    def _inside(self) -> int:
        return sum(state == "in" for state in self.states.values())

    def _table(self) -> tuple[list[Arm], np.ndarray]:
        """Open arms, and their effects [pairs that count, arms]."""
        arms = self.open
        rows = [[found[arm] for arm in arms] for found in self.effects if found is not None]
        return arms, np.array(rows, np.float64).reshape(len(rows), len(arms))

    # ---- what is known

    def result(self) -> Settled[Arm]:
        """At any moment."""
        rank = {"in": 0, "open": 1, "out": 2}
        standings = []
        for arm in self.arms:
            own = [found[arm] for found in self.effects if found is not None and arm in found]
            lead, half = self.leads.get(arm, (0.0, float("inf")))
            mean = float(np.mean(own)) if own else float("nan")
            standings.append(Standing(arm, self.states[arm], len(own), mean, lead, half))
        standings.sort(key=lambda s: (rank[s.state], -s.effect))
        settled = not self.open
        why: Why = "under way"
        if settled:
            why = "every pair" if len(self.effects) == self.pairs else "settled"
        elif self._out_of_budget:
            why = "budget"
        elif len(self.effects) == self.pairs:
            why = "nothing"
        return Settled(
            top=tuple(s.arm for s in standings[: self.places]),
            settled=settled,
            why=why,
            standings=tuple(standings),
            confidence=self.confidence,
            pairs=self.pairs,
            visited=len(self.effects),
            counted=sum(found is not None for found in self.effects),
            looks=self.looked,
            spent=self.spent,
            exhaustive=self.pairs * (BESIDE + sum(self.costs.values())),
        )


Pull = Callable[[Sequence[Arm], int], Mapping[Arm, float] | None]


def run_race(race: Race[Arm], pull: Pull[Arm]) -> Settled[Arm]:
    """To its end. pull(arms, pair): the effect of each arm for that pair, None where its total
    effect is nothing that could be restored."""
    while (ask := race.wanted()) is not None:
        for pair in ask.pairs:
            race.tell(pull(ask.arms, pair))
    return race.result()


def looks(pairs: int, first: int = FIRST, growth: float = GROWTH) -> list[int]:
    """After how many pairs decisions are made, the last pair left out: 5, 8, 12, 18, 27, ..."""
    found, at = [], first
    while at < pairs:
        found.append(at)
        at = max(at + 1, ceil(at * growth))
    return found


def pull_order(pairs: int, seed: int) -> list[int]:
    """A random order of so many pairs, the same on every machine."""
    return random.Random(seed).sample(range(pairs), pairs)
