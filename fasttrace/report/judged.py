"""What an evaluation says of each edit: shares and score differences with their intervals.

UA, IRA and CRA are those of UnlearnCanvas (Zhang et al., arXiv 2402.11846): unlearning accuracy,
the share of the edited phrase's pictures that no longer show it; in-domain retain accuracy, the
share of the same attribute's other prompts that still show what they say; cross-domain retain
accuracy, the same for all other attributes, over every prompt, the edited one's own included.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import isnan

import numpy as np

from fasttrace.report.uncertainty import (
    bootstrap_weights,
    percentiles,
    prompt_means,
    resampling_units,
)
from fasttrace.types import Judgement

EDITED, PARAPHRASE, MISSPELLING = "edited", "paraphrase", "misspelling"
NEIGHBOUR, OTHER = "neighbour", "other"
UNTOUCHED = (NEIGHBOUR, OTHER)


@dataclass(frozen=True)
class Figure:
    """A mean over prompts (seeds averaged inside). low, high: its interval, None with too few.

    unit: what `prompts` counts: prompts, or edits in a mean over edits.
    """

    value: float
    low: float | None
    high: float | None
    prompts: int
    pictures: int
    unit: str = "prompts"

    @property
    def n(self) -> str:
        """ "1 prompt", "12 edits" """
        return f"{self.prompts} {self.unit.removesuffix('s') if self.prompts == 1 else self.unit}"


@dataclass(frozen=True)
class Judged:
    """One edit's figures; None where nothing of the kind was asked.

    ua, ira, cra, misspelt, paraphrased: percent, with classifiers alone. before: the same shares of
    the unedited model, by those names. scores: role -> (score before, score after) of the prompt's
    own meaning; targets: of the prompt with the edit's target in it.
    """

    edit: str
    phrases: tuple[str, ...]
    metric: str
    ua: Figure | None
    ira: Figure | None
    cra: Figure | None
    misspelt: Figure | None  # share of misspelt phrases that no longer show the concept
    paraphrased: Figure | None
    before: dict[str, Figure | None]
    scores: dict[str, tuple[Figure, Figure]]
    changes: dict[str, Figure]  # role -> after - before
    targets: dict[str, tuple[Figure, Figure]]
    target_changes: dict[str, Figure]


SHARES = ("ua", "ira", "cra", "misspelt", "paraphrased")


def judge(rows: Sequence[Judgement]) -> list[Judged]:
    """One record an edit, in the rows' order."""
    return [_judged([r for r in rows if r.edit == e]) for e in dict.fromkeys(r.edit for r in rows)]


def figure(values: Iterable[tuple[str, int, float]], seed: int = 0) -> Figure | None:
    """values: (prompt, seed, value), NaN left out. None without any."""
    found: dict[tuple[str, int], list[float]] = {}
    for prompt, number, value in values:
        if not isnan(value):
            found.setdefault((prompt, number), []).append(value)
    if not found:
        return None
    prompts = list(dict.fromkeys(prompt for prompt, _ in found))
    seeds = list(dict.fromkeys(number for _, number in found))
    table = np.full((len(prompts), len(seeds)), np.nan)
    for (prompt, number), each in found.items():
        table[prompts.index(prompt), seeds.index(number)] = float(np.mean(each))
    present = ~np.isnan(table)
    unit, _ = resampling_units(present)
    low = high = None
    if unit != "none":
        weights = bootstrap_weights(present, unit, np.random.default_rng(seed))
        ends = percentiles(weights, table[None], present)
        low, high = (round(float(end[0]), 9) for end in ends)  # sums' last bits are no width
    return Figure(float(prompt_means(table).mean()), low, high, len(prompts), int(present.sum()))


def _judged(rows: Sequence[Judgement]) -> Judged:
    by_role: dict[str, list[Judgement]] = {}
    for row in rows:
        by_role.setdefault(row.role, []).append(row)
    edited = by_role.get(EDITED, [])
    phrases = tuple(dict.fromkeys(r.phrase for r in rows if r.role not in UNTOUCHED))
    own = {r.attribute for r in rows if r.role != OTHER}
    near = by_role.get(NEIGHBOUR, [])
    everything = [*edited, *near, *by_role.get(OTHER, [])]

    def gone(which: Sequence[Judgement], field: str) -> Figure | None:
        return _share(which, field, _gone)

    def kept(which: Sequence[Judgement], field: str) -> Figure | None:
        return _share(which, field, _kept_own)

    def crossed(which: Sequence[Judgement], field: str) -> Figure | None:
        return _share(which, field, lambda row, shown: _kept_others(row, shown, own))

    measures = {
        "ua": (gone, edited),
        "ira": (kept, near),
        "cra": (crossed, everything),
        "misspelt": (gone, by_role.get(MISSPELLING, [])),
        "paraphrased": (gone, by_role.get(PARAPHRASE, [])),
    }
    before, after = (
        {name: measure(which, field) for name, (measure, which) in measures.items()}
        for field in ("shown_before", "shown_after")
    )
    scores = {role: _change(which, "before", "after") for role, which in by_role.items()}
    targets = {role: _change(which, "new_before", "new_after") for role, which in by_role.items()}
    return Judged(
        edit=rows[0].edit,
        phrases=phrases,
        metric=rows[0].metric,
        **after,
        before=before,
        scores={role: (c[0], c[1]) for role, c in scores.items() if c is not None},
        changes={role: c[2] for role, c in scores.items() if c is not None},
        targets={role: (c[0], c[1]) for role, c in targets.items() if c is not None},
        target_changes={role: c[2] for role, c in targets.items() if c is not None},
    )


def mean(judged: Sequence[Judged]) -> Judged:
    """The mean over edits, each edit one unit of the intervals (`prompts` counts edits)."""

    def over(figures: Iterable[Figure | None]) -> Figure | None:
        found = [(j.edit, f) for j, f in zip(judged, figures, strict=True) if f is not None]
        whole = figure((name, 0, f.value) for name, f in found)
        pictures = sum(f.pictures for _, f in found)
        return whole and replace(whole, pictures=pictures, unit="edits")

    def by_role(maps: Sequence[dict[str, Figure]]) -> dict[str, Figure]:
        means = {role: over(m.get(role) for m in maps) for role in dict.fromkeys(chain(*maps))}
        return {role: f for role, f in means.items() if f is not None}

    def both(maps: Sequence[dict[str, tuple[Figure, Figure]]]) -> dict[str, tuple[Figure, Figure]]:
        first = by_role([{role: f[0] for role, f in m.items()} for m in maps])
        second = by_role([{role: f[1] for role, f in m.items()} for m in maps])
        return {role: (first[role], second[role]) for role in first}

    return Judged(
        edit=f"mean of {len(judged)} edits",
        phrases=tuple(dict.fromkeys(phrase for j in judged for phrase in j.phrases)),
        metric=judged[0].metric,
        **{name: over(getattr(j, name) for j in judged) for name in SHARES},
        before={name: over(j.before[name] for j in judged) for name in SHARES},
        scores=both([j.scores for j in judged]),
        changes=by_role([j.changes for j in judged]),
        targets=both([j.targets for j in judged]),
        target_changes=by_role([j.target_changes for j in judged]),
    )


def _change(
    rows: Sequence[Judgement], first: str, second: str
) -> tuple[Figure, Figure, Figure] | None:
    """Before, after, and the paired difference, of the rows that have both."""
    found = [
        (r.prompt, r.seed, one, two)
        for r in rows
        if (one := getattr(r, first)) is not None and (two := getattr(r, second)) is not None
        and not isnan(one + two)
    ]  # fmt: skip
    before = figure((prompt, seed, one) for prompt, seed, one, _ in found)
    after = figure((prompt, seed, two) for prompt, seed, _, two in found)
    change = figure((prompt, seed, two - one) for prompt, seed, one, two in found)
    if before is None or after is None or change is None:
        return None
    return before, after, change


_Verdict = Callable[[Judgement, dict[str, str]], list[bool]]


def _share(rows: Sequence[Judgement], field: str, verdict: _Verdict) -> Figure | None:
    """Percent of the verdicts that are true."""
    return figure(
        (r.prompt, r.seed, 100.0 * true)
        for r in rows
        for true in verdict(r, json.loads(getattr(r, field)))
    )


def _gone(row: Judgement, shown: dict[str, str]) -> list[bool]:
    return [not same for same in _kept_own(row, shown)]


def _kept_own(row: Judgement, shown: dict[str, str]) -> list[bool]:
    wanted = json.loads(row.expected).get(row.attribute)
    return [] if wanted is None else [shown[row.attribute] == wanted]


def _kept_others(row: Judgement, shown: dict[str, str], own: set[str]) -> list[bool]:
    wanted = json.loads(row.expected)
    return [shown[name] == value for name, value in wanted.items() if name not in own]
