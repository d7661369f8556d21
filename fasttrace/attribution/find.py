"""Screen everything, check what matters exactly, and bound what was missed.

The screen ranks all places of a plan. Exact patches are made of those that replace the whole stream
(a first-order score says little about them), of the K ranked highest among the others, and of a
random sample of the rest, which bounds how many above the threshold were left out (`audit.py`).
Winners are patched together as well: two that do no more than the better one are redundant. Then
inside them: the highest heads and channels, one by one and in one run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import combinations
from math import ceil, isfinite
from typing import Protocol

import numpy as np

from fasttrace.attribution.audit import audit, draw
from fasttrace.attribution.found import Cost, Finer, Found, Place, Together, Why
from fasttrace.attribution.parts import Part, part_of
from fasttrace.attribution.readings import Reading
from fasttrace.attribution.result import Screen
from fasttrace.attribution.screen import check_scored
from fasttrace.errors import UsageError
from fasttrace.plan.build import Setting, lane_digest
from fasttrace.plan.lanes import RUN
from fasttrace.plan.plan import Plan, PlannedRow
from fasttrace.report.names import KIND_WORDS, WHOLE_STREAM
from fasttrace.report.statistics import average_effects, counts, default_minimum, prompt_key
from fasttrace.types import Lane, Row, Site

Key = tuple[str, str]  # site, selector
PairName = tuple[int, int]  # probe, seed
TOP_SHARE, WINNERS = 0.2, 0.1
CLEAN_AND_CORRUPT = 2


class Runner(Protocol):
    """What makes exact runs."""

    def rows(self, plan: Plan, keys: Collection[str]) -> Iterable[Row]:
        """The plan's rows with these keys."""
        ...

    def parts(
        self, names: Sequence[PairName], groups: Sequence[Sequence[Part]]
    ) -> tuple[np.ndarray, int]:
        """Effects [pairs, groups] of parts patched together, and the runs that took."""
        ...


@dataclass(frozen=True)
class Asked:
    """top: K, None a fifth of the places that compete. audit: how many of the rest are drawn.
    threshold: in the metric's unit, None the last of the best tenth. always: kinds checked whatever
    their score. groups: so many winners are patched together, two by two and all at once, and
    looked into. inside: so many heads and channels of each. seed: of the draw."""

    top: int | None = None
    audit: int = 10
    threshold: float | None = None
    always: tuple[str, ...] = WHOLE_STREAM
    groups: int = 4
    inside: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("top", 1), ("audit", 0), ("groups", 0), ("inside", 0)):
            value = getattr(self, name)
            if value is None and name == "top":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"{name} is a whole number of at least {least}, not {value!r}.")
        number = isinstance(self.threshold, int | float) and not isinstance(self.threshold, bool)
        if self.threshold is not None and not (number and isfinite(self.threshold)):
            raise UsageError(f"The threshold {self.threshold!r} is not a finite number.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise UsageError(f"The seed of the draw is a whole number, not {self.seed!r}.")

    def check(self, plan: Plan) -> None:
        """Raises `UsageError` for kinds that the plan can't have."""
        own = {patch.site.kind for row in plan.rows for patch in row.lane.patches}
        unknown = [kind for kind in self.always if kind not in own | set(KIND_WORDS)]
        if unknown:
            raise UsageError(
                f"always names kinds of sites, and {unknown[0]!r} is none; this plan has "
                f"{', '.join(sorted(own))}."
            )

    def levels(self, plan: Plan) -> tuple[str, ...]:
        """Of the screen that is needed."""
        if plan.component != "unet" or not (self.inside and self.groups):
            return ("site",)
        kinds = {patch.site.kind for row in plan.rows for patch in row.lane.patches}
        heads = ("head",) if kinds & {"attn1", "attn2"} else ()
        return ("site", *heads, "channel")


@dataclass
class Cell:
    """A place of a plan: its row of every pair."""

    site: Site
    selector: str
    rows: dict[PairName, PlannedRow] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        return self.site.name, self.selector

    @property
    def runs(self) -> bool:
        """Whether any of it needs a run; else it is provably nothing."""
        return any(row.status == RUN for row in self.rows.values())


def find(plan: Plan, screen: Screen, runner: Runner, asked: Asked) -> Found:
    """plan, screen: of the same places and pairs.

    Raises `UsageError` where there is nothing to rank or no pair has anything to restore.
    """
    cells = {key: cell for key, cell in cells_of(plan).items() if cell.runs}
    if len(cells) < 2:
        raise UsageError("There is one place at most to patch, so nothing has to be found.")
    if screen.nothing:
        raise UsageError(screen.nothing)
    scores = Scores(plan, screen)
    ranked = {key: scores.mean(cell, scores.likely) for key, cell in cells.items()}
    why = choose(cells, ranked, asked)
    wanted = {row.key for key in why for row in cells[key].rows.values()}
    order = {row.key: i for i, row in enumerate(plan.rows)}
    rows = sorted(runner.rows(plan, wanted), key=lambda row: order[row.key])
    least = default_minimum(rows)[rows[0].metric]
    used = {(prompt_key(r), r.seed) for r in rows if counts(r, least)}
    names = [n for n in scores.names if (scores.prompt(n), n[1]) in used]
    if not names:
        raise UsageError(
            "None of these pairs has anything to restore: corrupting the subject doesn't lower the "
            f"score ({rows[0].metric}). Choose other prompts, seeds or another metric."
        )
    exact = {(e.site, e.selector): e for e in average_effects(rows, by="all", minimum=least)}
    places = []
    for key, cell in cells.items():
        one = exact.get(key)
        places.append(
            Place(
                cell.site.name,
                cell.selector,
                cell.site.kind,
                cell.site.index,
                scores.mean(cell, names),
                exact=None if one is None else one.effect,
                low=None if one is None else one.low,
                high=None if one is None else one.high,
                why=why.get(key, ""),
            )
        )
    verified = [p for p in places if p.why in ("always", "top") and p.exact is not None]
    verified.sort(key=lambda p: -(p.exact or 0.0))
    cut, threshold = "as asked", asked.threshold
    if threshold is None:
        last = verified[min(max(1, round(WINNERS * len(places))), len(verified)) - 1]
        cut, threshold = f"that of {last.name}, the last of the best tenth", last.exact or 0.0
    drawn = [p for p in places if p.why == "audit"]
    above = sum((p.exact or 0.0) > threshold for p in drawn)
    winners = [p for p in verified if (p.exact or 0.0) >= threshold][: asked.groups]
    joint, joint_runs = _together(plan, cells, winners, runner, least)
    finer, finer_runs = _inside(scores, winners, names, runner, asked.inside)
    pairs = len(scores.names)
    totals = {(prompt_key(r), r.seed): r.total_effect for r in rows if counts(r, least)}
    return Found(
        component=plan.component,
        metric=plan.metrics[0].key,
        estimator=screen.estimator,
        pairs=pairs,
        counted=len(names),
        total_effect=over_prompts((prompt, value) for (prompt, _), value in totals.items()),
        noise_floor=max(row.noise_floor for row in rows),
        threshold=threshold,
        cut=cut,
        places=tuple(places),
        together=joint,
        finer=finer,
        audit=audit(len(places) - len(why) + len(drawn), len(drawn), above),
        cost=Cost(
            screen=screen.generations * pairs,
            exact=sum(r.status == RUN for r in rows) + CLEAN_AND_CORRUPT * pairs,
            together=joint_runs,
            inside=finer_runs,
            exhaustive=sum(r.status == RUN for c in cells.values() for r in c.rows.values())
            + CLEAN_AND_CORRUPT * pairs,
        ),
        manifest=plan.manifest,
        rows=tuple(rows),
        screen=screen,
    )


def over_prompts(values: Iterable[tuple[object, float]]) -> float:
    """(prompt, value) of pairs: the mean over prompts of the mean over seeds, as all averages."""
    by: dict[object, list[float]] = {}
    for prompt, value in values:
        by.setdefault(prompt, []).append(value)
    return float(np.mean([np.mean(own) for own in by.values()]))


def cells_of(plan: Plan) -> dict[Key, Cell]:
    """In the plan's order. Raises `UsageError` for a plan that a screen has no scores for."""
    if len(plan.metrics) != 1:
        raise UsageError(f"Places are found by one metric, not {len(plan.metrics)}.")
    check_scored(plan)
    found: dict[Key, Cell] = {}
    windows = set()
    for row in plan.rows:
        [patch] = row.lane.patches
        windows.add(patch.selector.window)
        key = patch.site.name, patch.selector.label
        cell = found.setdefault(key, Cell(patch.site, patch.selector.label))
        cell.rows[row.probe, row.seed] = row
    if len(windows) > 1:
        raise UsageError(f"Places are found in one window of calls at a time, not {len(windows)}.")
    return found


def choose(cells: Mapping[Key, Cell], scores: Mapping[Key, float], asked: Asked) -> dict[Key, Why]:
    """What is checked exactly, and why, in the plan's order."""
    always = [key for key, cell in cells.items() if cell.site.kind in asked.always]
    order = {key: i for i, key in enumerate(cells)}
    rest = sorted((k for k in cells if k not in set(always)), key=lambda k: (-scores[k], order[k]))
    count = ceil(TOP_SHARE * len(rest)) if asked.top is None else asked.top
    top, others = rest[:count], sorted(rest[count:], key=order.__getitem__)
    names = [f"{site} {selector}" for site, selector in others]
    drawn = set(draw(names, asked.audit, asked.seed))
    why: dict[Key, Why] = dict.fromkeys(always, "always")
    why |= dict.fromkeys(top, "top")
    why |= {key: "audit" for key, name in zip(others, names, strict=True) if name in drawn}
    return {key: why[key] for key in cells if key in why}


def plan_groups(plan: Plan, groups: Sequence[Sequence[Cell]]) -> Plan:
    """A plan in which each lane patches all places of a group, for every pair that has them all."""
    setting = Setting(**{f.name: plan.manifest[f.name] for f in fields(Setting)})
    [metric] = plan.metrics
    rows = []
    pairs = dict.fromkeys((row.probe, row.seed) for row in plan.rows)
    for probe, seed in pairs:
        start = plan.starts[seed]
        pair = setting.pair(plan.probes[probe], start)
        for group in groups:
            own = [cell.rows.get((probe, seed)) for cell in group]
            patches = [p for row in own if row is not None for p in row.lane.patches]
            if len(patches) != len(group):
                continue
            lane = Lane(tuple(patches))
            key = setting.key(plan.probes[probe], start, lane, metric)
            picture = f"{pair}_{lane_digest(lane)[:16]}"
            rows.append(PlannedRow(key, probe, seed, lane, metric.key, RUN, picture))
    return replace(plan, rows=tuple(rows))


def _together(
    plan: Plan, cells: Mapping[Key, Cell], winners: Sequence[Place], runner: Runner, least: float
) -> tuple[tuple[Together, ...], int]:
    """Group patches of the winners, and the runs they took."""
    ordered = sorted(winners, key=lambda p: (p.index, p.selector))
    groups: list[tuple[Place, ...]] = list(combinations(ordered, 2))
    if len(ordered) > 2:
        groups.append(tuple(ordered))
    joint = plan_groups(plan, [[cells[p.key] for p in group] for group in groups])
    if not joint.rows:
        return (), 0
    rows = {row.key: row for row in runner.rows(joint, joint.keys)}
    values: dict[tuple[Key, ...], list[Row]] = {}
    for planned in joint.rows:
        key = tuple((p.site.name, p.selector.label) for p in planned.lane.patches)
        values.setdefault(key, []).append(rows[planned.key])
    found = []
    for group in groups:
        keys = tuple(p.key for p in group)
        own = [r for r in values.get(keys, ()) if counts(r, least)]
        if own:
            alone = tuple(p.exact or 0.0 for p in group)
            effect = over_prompts((prompt_key(r), r.effect) for r in own)
            found.append(Together(keys, tuple(p.name for p in group), alone, effect))
    pairs = len({(row.probe, row.seed) for row in joint.rows})
    return tuple(found), len(joint.rows) + CLEAN_AND_CORRUPT * pairs


def _inside(
    scores: Scores, winners: Sequence[Place], names: Sequence[PairName], runner: Runner, count: int
) -> tuple[tuple[Finer, ...], int]:
    """Of each winner the `count` highest heads and channels, one by one and together."""
    asked: list[tuple[Place, Reading, tuple[int, ...]]] = []
    for place in winners:
        for reading in scores.parts_of(place.site):
            means = scores.means_of_parts(reading, names)
            best = np.argsort(-means, kind="stable")[:count].tolist()
            asked += [(place, reading, (i,)) for i in best]
            if len(best) > 1:
                asked.append((place, reading, tuple(best)))
    if not asked or not count:
        return (), 0
    groups = [[part_of(reading, i) for i in chosen] for _, reading, chosen in asked]
    effects, runs = runner.parts(names, groups)
    found = []
    for column, (place, reading, chosen) in enumerate(asked):
        exact = over_prompts((scores.prompt(n), effects[i, column]) for i, n in enumerate(names))
        score = float(scores.means_of_parts(reading, names)[list(chosen)].sum())
        found.append(Finer(place.site, place.kind, reading.axis, chosen, score, exact))
    return tuple(found), runs


class Scores:
    """A screen's scores by place and pair of the plan that it was made of."""

    def __init__(self, plan: Plan, screen: Screen) -> None:
        self.plan, self.screen = plan, screen
        self.names: list[PairName] = list(dict.fromkeys((r.probe, r.seed) for r in plan.rows))
        given = [(plan.probes[probe], seed) for probe, seed in self.names]
        if given != [(pair.probe, pair.seed) for pair in screen.pairs]:
            raise UsageError("This screen is of other pairs than the plan.")
        self._pair = {name: i for i, name in enumerate(self.names)}
        self._reading = {r.site: r for r in screen.readings if r.axis in ("all", "token")}
        totals = [max(0.0, p.total_effect) for p in screen.pairs if not p.note]
        least = 0.1 * float(np.median(totals)) if totals else 0.0
        # The noise floor isn't known before exact runs.
        good = [not p.note and p.total_effect > least for p in screen.pairs]
        self.likely = [n for n, yes in zip(self.names, good, strict=True) if yes] or self.names

    def prompt(self, name: PairName) -> tuple[object, ...]:
        """As `prompt_key` of a row."""
        p = self.plan.probes[name[0]]
        return (p.prompt, p.subject, p.occurrence, p.negative_prompt, p.attribute)

    def mean(self, cell: Cell, names: Iterable[PairName]) -> float:
        """Of one place over those of these pairs that have it; 0 where none has."""
        own = [(self.prompt(n), self._of(cell, n)) for n in names if n in cell.rows]
        return over_prompts(own) if own else 0.0

    def _of(self, cell: Cell, name: PairName) -> float:
        selector = cell.rows[name].lane.patches[0].selector
        effects = self.screen.effects(self._reading[cell.site.name], selector.window)
        row = effects[self._pair[name]]
        return float(row.sum() if selector.tokens is None else row[list(selector.tokens)].sum())

    def parts_of(self, site: str) -> list[Reading]:
        """Readings of a site's heads and channels; none where they weren't screened."""
        return [r for r in self.screen.readings if r.site == site and r.axis in ("head", "channel")]

    def means_of_parts(self, reading: Reading, names: Sequence[PairName]) -> np.ndarray:
        """[size] over these pairs, as `mean`."""
        effects = self.screen.effects(reading, self.screen.windows[0])
        prompts = [self.prompt(n) for n in names]
        rows = effects[[self._pair[n] for n in names]]
        weights = np.array([1 / prompts.count(p) for p in prompts]) / len(set(prompts))
        found: np.ndarray = weights @ rows
        return found
