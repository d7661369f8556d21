"""From rows to numbers: average indirect effects, intervals, tests, causal sets.

Definitions (Basu et al., ICLR 2024, section 3; docs/method.md). A *pair* is one (probe, seed).
AIE(site) = mean over prompts of the mean over seeds: of the patched score ("score", the paper's
form), of score minus corrupt ("effect"). "normalised" is the effect divided by the same mean of the
total effect: a ratio of means, since in a mean of ratios the pairs with the smallest total effect
outweigh all others.

A pair whose total effect is at or below max(noise floor, `minimum`) has nothing to restore: it is
left out of every mean here and counted. Rows are turned so that a positive effect leads towards the
clean run, whatever the metric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from fasttrace.errors import UsageError
from fasttrace.report.names import components_in_order, in_order
from fasttrace.report.uncertainty import (
    Array,
    Unit,
    bootstrap_weights,
    holm,
    percentiles,
    prompt_means,
    resampling_units,
    sign_flip_p,
    smallest_p,
)
from fasttrace.types import Row

Scale = Literal["score", "effect", "normalised"]
ALPHA = 0.05
_SEED = 20231013


@dataclass(frozen=True)
class SiteEffect:
    """The average indirect effect of one site (and selector, branch, window) in one group.

    score, effect: in the metric's unit, effect towards the clean run; normalised: effect divided by
    the mean total effect of the same pairs. NaN where every pair was left out. low, high: the 95 %
    interval of `effect`; normalised_low, normalised_high: that of `normalised`. p is unadjusted,
    p_holm adjusted; None where there are too few units.
    """

    group: str
    metric: str
    component: str
    site: str
    site_index: int
    kind: str
    selector: str
    branch: str
    window: tuple[int, int]
    status: str
    prompts: int
    pairs: int
    excluded: int  # pairs left out
    score: float
    effect: float
    normalised: float
    noise_floor: float
    unit: Unit = "none"  # what the interval and the test resample
    units: int = 0
    low: float | None = None
    high: float | None = None
    normalised_low: float | None = None
    normalised_high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    tests: int = 0  # how many sites p_holm is adjusted for
    position: float | None = None  # mean place of its first token in the prompt; None is all tokens

    @property
    def below_floor(self) -> bool:
        """Whether the effect can't be told from the noise of the computation, in either sign."""
        return not abs(self.effect) > self.noise_floor

    @property
    def testable(self) -> bool:
        """Whether so few units could give a Holm-adjusted p of 0.05 at all."""
        return self.p_holm is not None and smallest_p(self.units, self.tests) * self.tests <= ALPHA

    @property
    def beyond_chance(self) -> bool:
        """Whether the Holm-adjusted p is at most 0.05."""
        return self.p_holm is not None and self.p_holm <= ALPHA

    @property
    def interval_text(self) -> str:
        """ "[1.20, 2.40]", or how few there were."""
        if self.low is None or self.high is None:
            return f"n = {self.prompts}, no interval"
        return f"[{self.low:.3g}, {self.high:.3g}]"

    def value(self, scale: Scale) -> float:
        if scale not in ("score", "effect", "normalised"):
            raise UsageError(f"scale {scale!r} is unknown: score, effect or normalised.")
        return float(getattr(self, scale))


Grouping = Callable[[Row], str]
GROUPINGS: dict[str, Grouping] = {
    "attribute": lambda row: row.attribute or "all",
    "prompt": lambda row: row.prompt,
    "subject": lambda row: row.subject,
    "all": lambda row: "all",
}


def grouping(by: str | Grouping) -> Grouping:
    """The function a word stands for. Raises `UsageError` for an unknown word."""
    if callable(by):
        return by
    if by not in GROUPINGS:
        raise UsageError(f"can't group by {by!r}: expected one of {', '.join(GROUPINGS)}.")
    return GROUPINGS[by]


def prompt_key(row: Row) -> tuple[Any, ...]:
    """What makes a prompt one prompt: its probe."""
    return (row.prompt, row.subject, row.occurrence, row.negative_prompt, row.attribute)


def default_minimum(rows: Iterable[Row]) -> dict[str, float]:
    """Per metric a tenth of the median total effect over pairs (0 where that is negative).

    Where corrupting the subject hardly changed the score, what a patch does to it is chance.
    """
    totals: dict[str, dict[Any, float]] = {}
    for row in rows:
        totals.setdefault(row.metric, {})[(prompt_key(row), row.seed)] = row.total_effect
    return {m: max(0.0, 0.1 * float(np.median(list(t.values())))) for m, t in totals.items()}


def counts(row: Row, minimum: float) -> bool:
    """Whether the row's pair has something to restore: total effect above floor and minimum."""
    return row.total_effect > max(row.noise_floor, minimum)


def average_effects(
    rows: Sequence[Row],
    *,
    by: str | Grouping = "attribute",
    minimum: float | None = None,
) -> list[SiteEffect]:
    """One `SiteEffect` a site (and selector, window, ...) in each group, in execution order.

    `by`: one of `GROUPINGS`, or a function from a row to its group's name.

    `minimum` is in the metric's unit; None takes `default_minimum`.
    """
    group_of = grouping(by)
    least = default_minimum(rows)
    if minimum is not None:
        least = dict.fromkeys(least, minimum)
    tables: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        tables.setdefault((group_of(row), row.metric, row.component), []).append(row)
    found: list[SiteEffect] = []
    groups = in_order(group for group, _, _ in tables)
    parts = components_in_order(component for _, _, component in tables)
    order = sorted(tables, key=lambda key: (groups.index(key[0]), parts.index(key[2])))
    for group, metric, component in order:
        table = tables[group, metric, component]
        found += _table_effects(table, group, least[metric])
    return found


def _table_effects(rows: list[Row], group: str, minimum: float) -> list[SiteEffect]:
    cells: dict[tuple[Any, ...], list[Row]] = {}
    prompts: dict[Any, int] = {}
    seeds: dict[int, dict[int, int]] = {}
    for row in rows:
        cells.setdefault(_cell_key(row), []).append(row)
        number = prompts.setdefault(prompt_key(row), len(prompts))
        of_prompt = seeds.setdefault(number, {})
        of_prompt.setdefault(row.seed, len(of_prompt))
    width = max(len(of_prompt) for of_prompt in seeds.values())
    shape = (len(cells), len(prompts), width)
    effect, total = np.full(shape, np.nan), np.full(shape, np.nan)
    ordered = sorted(cells.items(), key=lambda item: item[0][:2])
    found: list[SiteEffect] = []
    for c, (_, members) in enumerate(ordered):
        scores = np.full(shape[1:], np.nan)
        for row in members:
            if not counts(row, minimum):
                continue
            p = prompts[prompt_key(row)]
            s = seeds[p][row.seed]
            scores[p, s] = row.score
            effect[c, p, s] = row.effect
            total[c, p, s] = row.total_effect
        found.append(_describe(members, group, scores, effect[c], total[c]))
    return _with_holm(_with_uncertainty(found, effect, total))


def _cell_key(row: Row) -> tuple[Any, ...]:
    # The first two give the order; `tokens` may differ between prompts and is no part of the cell.
    return (
        row.site_index,
        _selector_order(row),
        row.site,
        row.kind,
        row.selector,
        row.branch,
        row.window_start,
        row.window_stop,
    )


def _selector_order(row: Row) -> tuple[int, int, str]:
    first = row.tokens[0] if row.tokens else -1
    return (row.window_start, first if row.selector.startswith("token") else -1, row.selector)


def aie(values: Array) -> Array:
    """[..., P, S] -> [...]: mean over prompts of the mean over seeds, absent values left out."""
    return prompt_means(prompt_means(values))


def _describe(
    members: list[Row], group: str, scores: Array, effect: Array, total: Array
) -> SiteEffect:
    row = members[0]
    present = ~np.isnan(effect)
    return SiteEffect(
        group=group,
        metric=row.metric,
        component=row.component,
        site=row.site,
        site_index=row.site_index,
        kind=row.kind,
        selector=row.selector,
        branch=row.branch,
        window=(row.window_start, row.window_stop),
        status="run" if any(r.status == "run" for r in members) else row.status,
        prompts=int(present.any(-1).sum()),
        pairs=int(present.sum()),
        excluded=len(members) - int(present.sum()),
        score=float(aie(scores)),
        effect=float(aie(effect)),
        normalised=float(aie(effect) / aie(total)),
        noise_floor=max(r.noise_floor for r in members),
        position=_position(members),
    )


def _position(members: list[Row]) -> float | None:
    firsts = [row.tokens[0] for row in members if row.tokens]
    return sum(firsts) / len(firsts) if firsts else None


def _with_uncertainty(found: list[SiteEffect], effect: Array, total: Array) -> list[SiteEffect]:
    """Cells with the same pairs present share their resamples, so they stay comparable."""
    alike: dict[bytes, list[int]] = {}
    for c in range(len(found)):
        alike.setdefault((~np.isnan(effect[c])).tobytes(), []).append(c)
    done = list(found)
    for members in alike.values():
        present = ~np.isnan(effect[members[0]])
        unit, units = resampling_units(present)
        if unit == "none":
            continue
        rng = np.random.default_rng(_SEED)
        weights = bootstrap_weights(present, unit, rng)
        low, high = percentiles(weights, effect[members], present)
        n_low, n_high = percentiles(weights, effect[members], present, total[members])
        floors = np.array([found[c].noise_floor for c in members])
        p = sign_flip_p(effect[members] - floors[:, None, None], present, unit, rng)
        for k, c in enumerate(members):
            done[c] = replace(
                found[c],
                unit=unit,
                units=units,
                low=float(low[k]),
                high=float(high[k]),
                normalised_low=float(n_low[k]),
                normalised_high=float(n_high[k]),
                p=float(p[k]) if found[c].status == "run" else None,
            )
    return done


def _with_holm(found: list[SiteEffect]) -> list[SiteEffect]:
    tested = [(c, e.p) for c, e in enumerate(found) if e.p is not None]
    done = list(found)
    for (c, _), value in zip(tested, holm([p for _, p in tested]), strict=True):
        done[c] = replace(found[c], p_holm=value, tests=len(tested))
    return done
