"""From a `Result` and its manifest to what the template prints; no HTML here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fasttrace.report.causal import CausalLabel
from fasttrace.report.charts import (
    Chart,
    Ranks,
    Spots,
    Whisker,
    execution_map,
    limit_of,
    token_map,
    u_shape,
    whiskers,
)
from fasttrace.report.examples import Example, counted_first, example_of
from fasttrace.report.facts import below, correlations, facts, settings, unrun
from fasttrace.report.names import (
    KIND_WORDS,
    WHOLE_STREAM,
    component_words,
    components_in_order,
    in_order,
    layer,
    words,
)
from fasttrace.report.result import Result
from fasttrace.report.settled import SettledLine, caution, settled_lines
from fasttrace.report.statistics import Grouping, SiteEffect, counts, grouping
from fasttrace.report.text import chance, percent, why_left_out, why_none
from fasttrace.store.manifest import Manifest
from fasttrace.store.settled import SettledRecord
from fasttrace.types import Row


@dataclass(frozen=True)
class TableLine:
    rank: int
    effect: SiteEffect
    place: str
    share: str
    chance: str
    whisker: Whisker


@dataclass(frozen=True)
class CausalTable:
    component: str
    lines: list[TableLine]


@dataclass(frozen=True)
class Group:
    """Everything about one attribute."""

    name: str
    prompts: int
    pairs: int
    excluded: int
    heads: list[str]  # one sentence a component
    shape: Chart | None
    examples: list[Example]
    tables: list[CausalTable]
    why_none: str  # why a table of it may be empty


@dataclass(frozen=True)
class View:
    model: str
    metric: str
    metrics: list[str]
    facts: list[tuple[str, str]]
    groups: list[Group]
    maps: list[tuple[str, Chart, str]]  # component, chart, the largest share
    token_maps: list[tuple[str, list[Chart], str]]  # component and kind, a chart a group
    floor: float
    minimum: float
    usual_minimum: bool
    left_out: list[tuple[Row, str]]  # and why
    until: SettledRecord | None  # what an adaptive sweep settled
    settled: list[SettledLine]
    caution: str  # what averages over unequal pairs can't say; empty where they are equal
    nothing: str  # why no site is causal; empty where there is one
    whole_stream: list[str]  # kinds of causal sites that replace everything passing there, in words
    below_floor: list[tuple[str, int, int]]  # component, below, run
    unrun: list[tuple[str, str, int]]  # component, why, how many sites
    testable: bool
    correlations: list[tuple[str, list[tuple[str, str]]]]
    calls: list[str]
    settings: list[tuple[str, str]]
    planned: int
    rows: int
    versions: list[str]


def build_view(
    result: Result,
    manifest: Manifest,
    *,
    by: str = "attribute",
    metric: str | None = None,
    minimum: float | None = None,
    threshold: float | None = None,
    top: int | None = None,
    validation: Sequence[CausalLabel] | None = None,
    examples: int = 4,
) -> View:
    """`examples`: pictures of so many pairs a group, the first ones in the table's order."""
    metric = metric or result.metrics[0]
    kept = result.where(metric=metric)
    least = kept.minimum[metric] if minimum is None else minimum
    group_of = _with_windows(grouping(by), kept.rows)
    effects = kept.aie(group_of, minimum=least)
    chosen = kept.causal(threshold, top, validation, by=group_of, minimum=least)
    ranks = _ranks(chosen)
    names = in_order(e.group for e in effects)
    effects.sort(key=lambda e: names.index(e.group))
    pairs = kept.pairs()
    parts: dict[tuple[Any, str], list[Row]] = {}
    for pair, rows in pairs.items():
        for row in rows:
            parts.setdefault((pair, group_of(row)), []).append(row)
    shown: dict[str, list[Example]] = {name: [] for name in names}
    spots: Spots = {}
    for part in counted_first(list(parts.values()), least):
        name = group_of(part[0])
        if len(shown[name]) < examples:
            first = not shown[name]
            shown[name].append(example_of(kept, part, least, spots if first else None, name))
    kept.warn_of_damage()
    limits = {c: limit_of([e for e in effects if e.component == c]) for c in kept.components}
    return View(
        model=kept.rows[0].model,
        metric=metric,
        metrics=result.metrics,
        facts=facts(kept, len(pairs)),
        groups=[
            _group(
                name,
                [e for e in effects if e.group == name],
                [e for e in chosen if e.group == name],
                limits,
                ranks,
                spots,
                shown[name],
                [part[0] for (_, group), part in parts.items() if group == name],
                least,
            )
            for name in names
        ],
        maps=[
            (
                component_words(c),
                execution_map([e for e in effects if e.component == c], ranks, spots),
                percent(limits[c]),
            )
            for c in kept.components
            if not _is_text(effects, c)
        ],
        token_maps=_token_maps(effects, names, kept.components, limits, ranks, spots),
        floor=kept.noise_floor,
        minimum=least,
        usual_minimum=minimum is None,
        left_out=[(p[0], why_left_out(p[0])) for p in pairs.values() if not counts(p[0], least)],
        until=kept.until,
        settled=[] if kept.until is None else settled_lines(kept.until),
        caution="" if kept.until is None else caution(kept.until, result.rows),
        nothing="" if chosen else why_none(kept.rows, {metric: least}),
        whole_stream=[KIND_WORDS[k] for k in WHOLE_STREAM if any(e.kind == k for e in chosen)],
        below_floor=[below(effects, c) for c in kept.components],
        unrun=unrun(effects),
        testable=any(e.testable for e in effects),
        correlations=correlations(effects, names, kept.components),
        calls=list(dict.fromkeys(call.command for call in manifest.calls)),
        settings=settings(kept, manifest),
        planned=max((call.planned for call in manifest.calls), default=0),
        rows=len(result),
        versions=sorted({row.versions for row in kept.rows}),
    )


def _with_windows(base: Grouping, rows: Sequence[Row]) -> Grouping:
    """Groups of their own for each window and branch, where a component was traced in several."""
    seen: dict[str, set[tuple[str, int, int]]] = {}
    for row in rows:
        seen.setdefault(row.component, set()).add((row.branch, row.window_start, row.window_stop))

    def group(row: Row) -> str:
        if len(seen[row.component]) == 1:
            return base(row)
        return f"{base(row)}, {row.branch}, calls {row.window_start} to {row.window_stop - 1}"

    return group


def _is_text(effects: Sequence[SiteEffect], component: str) -> bool:
    return all(layer(e.site) is not None for e in effects if e.component == component)


def _token_maps(
    effects: Sequence[SiteEffect],
    names: list[str],
    components: list[str],
    limits: dict[str, float],
    ranks: Ranks,
    spots: Spots,
) -> list[tuple[str, list[Chart], str]]:
    """A line of charts for each kind of site, a chart a group; one line of kinds for one group."""
    found = []
    for component in components:
        if not _is_text(effects, component):
            continue
        own = [e for e in effects if e.component == component]
        kinds = {kind: KIND_WORDS.get(kind, kind) for kind in dict.fromkeys(e.kind for e in own)}

        def chart(kind: str, name: str, title: str, own: list[SiteEffect] = own) -> Chart:
            cells = [e for e in own if e.kind == kind and e.group == name]
            return token_map(cells, limits[cells[0].component], ranks, spots, title)

        top = percent(limits[component])
        if len(names) == 1:
            charts = [chart(kind, names[0], word) for kind, word in kinds.items()]
            found.append((component_words(component), charts, top))
            continue
        for kind, word in kinds.items():
            groups = [n for n in names if any(e.kind == kind and e.group == n for e in own)]
            charts = [chart(kind, name, name) for name in groups]
            found.append((f"{component_words(component)}: {word}", charts, top))
    return found


def _ranks(chosen: Sequence[SiteEffect]) -> Ranks:
    ranks: Ranks = {}
    counters: dict[tuple[str, str], int] = {}
    for e in chosen:
        number = counters[e.group, e.component] = counters.get((e.group, e.component), 0) + 1
        ranks.setdefault((e.group, e.component, e.site, e.selector), number)
    return ranks


def _group(
    name: str,
    effects: list[SiteEffect],
    chosen: list[SiteEffect],
    limits: dict[str, float],
    ranks: Ranks,
    spots: Spots,
    examples: list[Example],
    pairs: list[Row],
    minimum: float,
) -> Group:
    components = components_in_order(e.component for e in effects)
    shapes = [
        u_shape(own, limits[c], ranks, spots)
        for c in components
        if (own := [e for e in effects if e.component == c]) and not _is_text(own, c)
    ]
    counted = [row for row in pairs if counts(row, minimum)]
    why = why_none(pairs, {row.metric: minimum for row in pairs})
    return Group(
        name=name,
        prompts=len({(r.prompt, r.subject, r.occurrence) for r in counted}),
        pairs=len(counted),
        excluded=len(pairs) - len(counted),
        heads=[_head(component, chosen, why) for component in components],
        shape=shapes[0] if shapes else None,
        examples=examples,
        tables=[_table(component, chosen) for component in components],
        why_none=why,
    )


def _head(component: str, chosen: Sequence[SiteEffect], why_none: str) -> str:
    best = next((e for e in chosen if e.component == component), None)
    if best is None:
        return f"{component_words(component)}: no causal site, {why_none}."
    where = words(best.site, best.kind)
    where += "" if best.selector == "all" else f" at {best.selector}"
    return f"{component_words(component)}: {where} restores {percent(best.normalised)}."


def _table(component: str, chosen: Sequence[SiteEffect]) -> CausalTable:
    own = [e for e in chosen if e.component == component]
    lines = [
        TableLine(i + 1, e, words(e.site, e.kind), percent(e.normalised), chance(e), whisker)
        for i, (e, whisker) in enumerate(zip(own, whiskers(own), strict=True))
    ]
    return CausalTable(component_words(component), lines)
