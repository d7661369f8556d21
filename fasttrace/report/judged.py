"""What an evaluation says of each edit: shares and score differences with their intervals.

UA, IRA and CRA are those of UnlearnCanvas (Zhang et al., arXiv 2402.11846): unlearning accuracy,
the share of the edited phrase's pictures that no longer show it; in-domain retain accuracy, the
share of the same attribute's other prompts that still show what they say; cross-domain retain
accuracy, the same for all other attributes, over every prompt, the edited one's own included.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

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
    """A mean over prompts (seeds averaged inside). low, high: its interval, None with too few."""

    value: float
    low: float | None
    high: float | None
    prompts: int
    pictures: int


@dataclass(frozen=True)
class Judged:
    """One edit's figures; None where nothing of the kind was asked.

    ua, ira, cra: percent, with classifiers alone. before: the same shares of the unedited model.
    scores: role -> (score before, score after) of the prompt's own meaning; targets: of the prompt
    with the edit's target in it.
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


def judge(rows: Sequence[Judgement]) -> list[Judged]:
    """One record an edit, in the rows' order."""
    return [_judged([r for r in rows if r.edit == e]) for e in dict.fromkeys(r.edit for r in rows)]


def figure(values: Iterable[tuple[str, int, float]], seed: int = 0) -> Figure | None:
    """values: (prompt, seed, value). None without any."""
    found: dict[tuple[str, int], list[float]] = {}
    for prompt, number, value in values:
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
        low, high = float(ends[0][0]), float(ends[1][0])
    return Figure(float(prompt_means(table).mean()), low, high, len(prompts), int(present.sum()))


def _judged(rows: Sequence[Judgement]) -> Judged:
    by_role: dict[str, list[Judgement]] = {}
    for row in rows:
        by_role.setdefault(row.role, []).append(row)
    edited = by_role.get(EDITED, [])
    phrases = tuple(dict.fromkeys(r.phrase for r in rows if r.role not in UNTOUCHED))
    own = {r.attribute for r in rows if r.role not in UNTOUCHED}
    near = [r for r in by_role.get(NEIGHBOUR, []) if r.attribute in own]
    everything = [*edited, *near, *by_role.get(OTHER, [])]

    def gone(which: Sequence[Judgement], field: str) -> Figure | None:
        return _share(which, field, _gone)

    def kept(which: Sequence[Judgement], field: str) -> Figure | None:
        return _share(which, field, _kept_own)

    def crossed(which: Sequence[Judgement], field: str) -> Figure | None:
        return _share(which, field, lambda row, shown: _kept_others(row, shown, own))

    pairs = [("ua", gone, edited), ("ira", kept, near), ("cra", crossed, everything)]
    after = {name: measure(which, "shown_after") for name, measure, which in pairs}
    scores, changes, targets = {}, {}, {}
    for role, which in by_role.items():
        scores[role] = _both(which, "before", "after")
        change = figure((r.prompt, r.seed, r.after - r.before) for r in which)
        if change is not None:
            changes[role] = change
        if which[0].new_after is not None:
            targets[role] = _both(which, "new_before", "new_after")
    return Judged(
        edit=rows[0].edit,
        phrases=phrases,
        metric=rows[0].metric,
        ua=after["ua"],
        ira=after["ira"],
        cra=after["cra"],
        misspelt=gone(by_role.get(MISSPELLING, []), "shown_after"),
        paraphrased=gone(by_role.get(PARAPHRASE, []), "shown_after"),
        before={name: measure(which, "shown_before") for name, measure, which in pairs},
        scores=scores,
        changes=changes,
        targets=targets,
    )


def _both(rows: Sequence[Judgement], first: str, second: str) -> tuple[Figure, Figure]:
    found = [
        figure((r.prompt, r.seed, getattr(r, name)) for r in rows if getattr(r, name) is not None)
        for name in (first, second)
    ]
    assert found[0] is not None and found[1] is not None
    return found[0], found[1]


_Verdict = Callable[[Judgement, dict[str, str]], list[bool]]


def _share(rows: Sequence[Judgement], field: str, verdict: _Verdict) -> Figure | None:
    """Percent of the verdicts that are true."""
    return figure(
        (r.prompt, r.seed, 100.0 * true)
        for r in rows
        for true in verdict(r, json.loads(getattr(r, field)))
    )


def _gone(row: Judgement, shown: dict[str, str]) -> list[bool]:
    wanted = json.loads(row.expected).get(row.attribute)
    return [] if wanted is None else [shown[row.attribute] != wanted]


def _kept_own(row: Judgement, shown: dict[str, str]) -> list[bool]:
    wanted = json.loads(row.expected).get(row.attribute)
    return [] if wanted is None else [shown[row.attribute] == wanted]


def _kept_others(row: Judgement, shown: dict[str, str], own: set[str]) -> list[bool]:
    wanted = json.loads(row.expected)
    return [shown[name] == value for name, value in wanted.items() if name not in own]
