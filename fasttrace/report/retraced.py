"""Trace, edit, trace again: the two traces side by side, in one scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fasttrace.errors import UsageError
from fasttrace.report.charts import Chart, Ranks, execution_map, limit_of, token_map
from fasttrace.report.judged import Figure, figure
from fasttrace.report.names import (
    KIND_WORDS,
    component_words,
    components_in_order,
    in_order,
    layer,
    words,
)
from fasttrace.report.result import Result
from fasttrace.report.statistics import SiteEffect, counts, prompt_key
from fasttrace.report.text import percent
from fasttrace.types import Row

BEFORE, AFTER = "before", "after"


@dataclass(frozen=True)
class SiteChange:
    """What an edited site did before and after the edit; change: paired, None without pairs."""

    place: str
    group: str
    before: SiteEffect
    after: SiteEffect
    change: Figure | None


@dataclass(frozen=True)
class Retraced:
    metric: str
    maps: list[tuple[str, Chart, str]]  # component, chart, the largest share
    token_maps: list[tuple[str, list[Chart], str]]  # component, kind and group; before, after
    sites: list[SiteChange]
    totals: list[tuple[str, Figure, Figure, Figure]]  # group: total effect before, after, change
    pairs: int
    counted: int
    alone: int  # rows that only one of the traces holds


def compare(before: Result, after: Result, edited: Iterable[str]) -> Retraced:
    """Of the rows both hold. Raises `UsageError` where there is none.

    After a good edit little is left to restore, so the edited model's own total effect would be no
    scale: effects of both are divided by the total effect before, over the pairs that count there.
    """
    metric = before.metrics[0] if before.rows else ""
    first, second = _by_key(before, metric), _by_key(after, metric)
    keys = [key for key in first if key in second]
    if not keys:
        raise UsageError(
            "the traces before and after the edit share no row: trace the same probes, seeds and "
            f"sites with the same metric ({metric or 'no rows'}) both times."
        )
    floors = {key: max(first[key].noise_floor, second[key].noise_floor) for key in keys}
    olds = [replace(first[key], noise_floor=floors[key]) for key in keys]
    news = [
        replace(second[key], noise_floor=floors[key], total_effect=first[key].total_effect)
        for key in keys
    ]
    group = _grouping(olds)
    minimum = Result(olds).minimum[metric]
    then, now = (Result(rows).aie(group, minimum=minimum) for rows in (olds, news))
    matched = {_cell(e): e for e in now}
    both = [(e, matched[_cell(e)]) for e in then]
    sites, groups = set(edited), len({e.group for e in then})
    marks: Ranks = {
        (_name(e.group, when, groups), e.component, e.site, e.selector): 1
        for e in then
        for when in (BEFORE, AFTER)
        if e.site in sites
    }
    pairs = {(prompt_key(r), r.seed): r for r in olds}
    return Retraced(
        metric=metric,
        maps=_maps(both, marks, groups),
        token_maps=_token_maps(both, marks, groups),
        sites=[
            _site(one, two, olds, news, group, minimum) for one, two in both if one.site in sites
        ],
        totals=_totals(
            [
                (first[k], second[k])
                for k, old in zip(keys, olds, strict=True)
                if counts(old, minimum)
            ],
            group,
        ),
        pairs=len(pairs),
        counted=sum(counts(r, minimum) for r in pairs.values()),
        alone=len(first) + len(second) - 2 * len(keys),
    )


def _by_key(result: Result, metric: str) -> dict[tuple[Any, ...], Row]:
    return {
        (*prompt_key(r), r.seed, r.component, r.site, r.selector, *_where(r)): r
        for r in result.rows
        if r.metric == metric
    }


def _where(row: Row) -> tuple[str, int, int]:
    return row.branch, row.window_start, row.window_stop


def _cell(e: SiteEffect) -> tuple[Any, ...]:
    return e.group, e.component, e.site, e.selector


def _grouping(rows: Sequence[Row]) -> Callable[[Row], str]:
    """Attributes; with the window, where there are several."""
    several = len({(r.component, _where(r)) for r in rows}) > len({r.component for r in rows})

    def group(row: Row) -> str:
        name = row.attribute or "all"
        if not several:
            return name
        return f"{name}, {row.branch}, calls {row.window_start} to {row.window_stop - 1}"

    return group


def _name(group: str, when: str, groups: int) -> str:
    return when if groups == 1 else f"{group}, {when}"


Both = Sequence[tuple[SiteEffect, SiteEffect]]


def _maps(both: Both, marks: Ranks, groups: int) -> list[tuple[str, Chart, str]]:
    """A chart a denoiser component; its bands are before and after, group by group."""
    found = []
    for component in components_in_order(e.component for e, _ in both):
        own = [(e, f) for e, f in both if e.component == component and layer(e.site) is None]
        if not own:
            continue
        bands = [
            replace(pair[i], group=_name(name, when, groups))
            for name in in_order(e.group for e, _ in own)
            for i, when in enumerate((BEFORE, AFTER))
            for pair in own
            if pair[0].group == name
        ]
        chart = execution_map(bands, marks, {})
        found.append((component_words(component), chart, percent(limit_of(bands))))
    return found


def _token_maps(both: Both, marks: Ranks, groups: int) -> list[tuple[str, list[Chart], str]]:
    found = []
    for component in components_in_order(e.component for e, _ in both):
        own = [(e, f) for e, f in both if e.component == component and layer(e.site) is not None]
        limit = limit_of([e for pair in own for e in pair])
        for kind in dict.fromkeys(e.kind for e, _ in own):
            for name in in_order(e.group for e, _ in own if e.kind == kind):
                cells = [p for p in own if p[0].kind == kind and p[0].group == name]
                charts = []
                for i, when in enumerate((BEFORE, AFTER)):
                    shown = [replace(p[i], group=_name(name, when, groups)) for p in cells]
                    charts.append(token_map(shown, limit, marks, {}, when))
                title = f"{component_words(component)}: {KIND_WORDS.get(kind, kind)}"
                title += "" if groups == 1 else f", {name}"
                found.append((title, charts, percent(limit)))
    return found


def _site(
    before: SiteEffect,
    after: SiteEffect,
    olds: Sequence[Row],
    news: Sequence[Row],
    group: Callable[[Row], str],
    minimum: float,
) -> SiteChange:
    place = words(before.site, before.kind)
    place += "" if before.selector == "all" else f" @ {before.selector}"
    change = figure(
        (_prompt(old), old.seed, new.effect - old.effect)
        for old, new in zip(olds, news, strict=True)
        if (group(old), old.component, old.site, old.selector) == _cell(before)
        and counts(old, minimum)
    )
    return SiteChange(place, before.group, before, after, change)


def _totals(
    rows: Sequence[tuple[Row, Row]], group: Callable[[Row], str]
) -> list[tuple[str, Figure, Figure, Figure]]:
    """Over the pairs that counted before, as the effects are; each once."""
    pairs = {(prompt_key(old), old.seed): (old, new) for old, new in rows}
    found = []
    for name in in_order(group(old) for old, _ in pairs.values()):
        own = [(old, new) for old, new in pairs.values() if group(old) == name]
        then = figure((_prompt(old), old.seed, old.total_effect) for old, _ in own)
        now = figure((_prompt(old), old.seed, new.total_effect) for old, new in own)
        change = figure(
            (_prompt(old), old.seed, new.total_effect - old.total_effect) for old, new in own
        )
        if then is not None and now is not None and change is not None:
            found.append((name, then, now, change))
    return found


def _prompt(row: Row) -> str:
    return "\0".join(map(str, prompt_key(row)))
