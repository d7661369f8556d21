"""A plan run adaptively: only until its top sites are known, or a budget is spent.

The places of the plan (a site; in a text encoder a site and token group) race on the scores of its
first metric, with `adaptive.Race`. Every run is one that the exhaustive plan has, at full fidelity:
all steps, the same row under the same key. So rows that are there already are told to the race in
place of running them again, and a sweep that was stopped is one whose first rows are known.

A pair counts where its total effect is above the noise floor (an exhaustive report also leaves out
those below a tenth of the median total effect, which is known at the end alone). The budget and the
cost are runs asked for: a pair's clean and corrupt run, and a run a site. Copies that measure the
noise floor, and a second clean run where a sweep was stopped within a pair, are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from math import isfinite
from typing import Any

from fasttrace.attribution.adaptive import Ask, Race, Settled, Standing, pull_order
from fasttrace.attribution.goal import Goal, parse_goal
from fasttrace.errors import UsageError
from fasttrace.plan.lanes import RUN
from fasttrace.plan.plan import Plan, PlannedRow
from fasttrace.report.statistics import counts
from fasttrace.store.settled import SettledRecord, SettledSite
from fasttrace.types import Row

Place = tuple[str, str, str]  # component, site, selector
SEED = 0  # of the order of pairs


class AdaptiveSweep:
    """Says which rows of a plan are wanted next, and what is known by now.

    until: "top10%@95" and the like, or a `Goal`. budget: the most runs, None for no limit. known:
    rows that are there already. Raises `UsageError` where the plan's places can't be compared with
    one another, the goal is no choice among them, or the budget is less than one pair takes.
    """

    def __init__(
        self,
        plan: Plan,
        until: str | Goal,
        budget: int | None = None,
        known: Iterable[Row] = (),
    ) -> None:
        check_budget(budget)
        for what, word in (("windows", "window"), ("sources", "source")):
            if len(plan.manifest.get(what) or ()) > 1:
                raise UsageError(
                    f"An adaptive sweep compares sites with one another, so it has one {word}; "
                    f"give one, or run one sweep a {word}."
                )
        self.plan, self.budget = plan, budget
        self.goal = parse_goal(until) if isinstance(until, str) else until
        self.metric = plan.metrics[0].key
        groups = groupby(plan.rows, key=lambda row: (row.probe, row.seed))
        pairs = [_by_place(rows) for _, rows in groups]
        if not pairs:
            raise UsageError("The plan has no rows, so there is nothing to settle.")
        self._pairs = [pairs[i] for i in pull_order(len(pairs), SEED)]
        everywhere = set(pairs[0]).intersection(*pairs[1:])
        places = [place for place in pairs[0] if place in everywhere]
        self.left_out = len({place for own in pairs for place in own} - everywhere)
        self._kinds = {place: pairs[0][place][0].lane.patches[0].site.kind for place in places}
        self.race: Race[Place] = Race(
            places,
            self.goal.count(len(places)),
            len(pairs),
            confidence=self.goal.confidence,
            budget=budget,
            costs={place: _cost(place, pairs) for place in places},
        )
        least = self.race.cost_of_a_pair()
        if budget is not None and budget < least:
            raise UsageError(
                f"A budget of {budget} runs is less than one pair takes: {least}, which are the "
                "clean run, the corrupt one and one a site."
            )
        self._planned = set(plan.keys)
        self._known: dict[str, Row] = {}
        for row in known:
            self.add(row)

    def add(self, row: Row) -> None:
        """A row that was made, now or earlier; one that is none of the plan's is nothing to it."""
        if row.key in self._planned:
            self._known[row.key] = row

    def wanted(self) -> Plan | None:
        """The rows up to the next look that are not known yet, as a part of the plan; None where
        the race is over. Looks for which all rows are known are decided on the way."""
        while (ask := self.race.wanted()) is not None:
            missing = [
                row
                for pair in ask.pairs
                for place in ask.arms
                for row in self._pairs[pair][place]
                if row.key not in self._known
            ]
            if missing:
                return replace(self.plan, rows=tuple(missing))
            self._tell(ask)
        return None

    def _tell(self, ask: Ask[Place]) -> None:
        for pair in ask.pairs:
            rows = {place: self._scored(pair, place) for place in ask.arms}
            self.race.noise = max([self.race.noise, *(r.noise_floor for r in rows.values())])
            if all(counts(row, 0.0) for row in rows.values()):
                self.race.tell({place: row.effect for place, row in rows.items()})
            else:
                self.race.tell(None)

    def _scored(self, pair: int, place: Place) -> Row:
        planned = self._pairs[pair][place]
        return next(self._known[row.key] for row in planned if row.metric == self.metric)

    @property
    def rows(self) -> int:
        """How many rows are known."""
        return len(self._known)

    @property
    def settled(self) -> Settled[Place]:
        """What is known after the last look."""
        return self.race.result()

    @property
    def record(self) -> SettledRecord:
        """The same as data."""
        found = self.settled
        return SettledRecord(
            until=self.goal.text,
            budget=self.budget,
            metric=self.metric,
            words=self._words(found),
            settled=found.settled,
            why=found.why,
            confidence=found.confidence,
            places=len(found.top),
            sites=[self._site(standing) for standing in found.standings],
            spent=found.spent,
            exhaustive=found.exhaustive,
            pairs=found.pairs,
            visited=found.visited,
            counted=found.counted,
            left_out=self.left_out,
        )

    def _words(self, found: Settled[Place]) -> str:
        words = str(found)
        if self.left_out:
            words += f" {self.left_out} places that only some prompts have took no part."
        return words

    def _site(self, standing: Standing[Place]) -> SettledSite:
        component, site, selector = standing.arm
        return SettledSite(
            component=component,
            site=site,
            selector=selector,
            kind=self._kinds[standing.arm],
            state=standing.state,
            pairs=standing.pairs,
            effect=_number(standing.effect),
            lead=_number(standing.lead) if isfinite(standing.half) else None,
            half=_number(standing.half),
        )


def run_adaptive(
    sweep: AdaptiveSweep,
    iter_rows: Callable[[Plan], Iterator[tuple[Row, dict[str, Any]]]],
    on_look: Callable[[Plan], None] | None = None,
) -> Iterator[tuple[Row, dict[str, Any]]]:
    """The rows that settle it, as they come. iter_rows: runs a part of the plan.

    on_look is given each part before it is run; the sweep then stands at the look before.
    """
    while (part := sweep.wanted()) is not None:
        if on_look is not None:
            on_look(part)
        for row, pictures in iter_rows(part):
            sweep.add(row)
            yield row, pictures


def check_budget(budget: int | None, until: object = True) -> None:
    """Raises `UsageError` for one that allows no run, or that limits nothing."""
    if budget is None:
        return
    if until is None:
        raise UsageError(
            "A budget limits an adaptive sweep: give until as well, such as top10%@95. (Memory for "
            "clean activations is the option 'cache'.)"
        )
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise UsageError(f"A budget is a whole number of runs, 1 or more, not {budget!r}.")


def _by_place(rows: Iterable[PlannedRow]) -> dict[Place, list[PlannedRow]]:
    """The rows of one pair; those of a place differ in their metric alone."""
    found: dict[Place, list[PlannedRow]] = {}
    for row in rows:
        first, last = row.lane.patches[0], row.lane.patches[-1]
        name = first.site.name if first == last else f"{first.site.name}..{last.site.name}"
        found.setdefault((first.site.component, name, first.selector.label), []).append(row)
    return found


def _cost(place: Place, pairs: Iterable[Mapping[Place, list[PlannedRow]]]) -> int:
    """Runs; 0 where every pair's row is known to be the base run."""
    return int(any(row.status == RUN for pair in pairs for row in pair[place]))


def _number(value: float) -> float | None:
    return value if isfinite(value) else None
