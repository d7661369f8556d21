"""Audits of screens, simulated over stored exact scores: how often the stated bound is too low."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil

import numpy as np
from adaptive_scores import ATTRIBUTES, FEW, METRICS, Scores

from fasttrace.attribution.audit import audit, draw

AUDITS = 200
SAMPLES = (3, 5, 10, 13)
TOP_SHARE = 0.2  # of the sites that compete, verified beside every ResNet: as `find` does
TENTH, THIRD = 0.1, 1 / 3


@dataclass(frozen=True)
class AuditRow:
    """Audits of one kind of screen.

    screen: what ranked. cut: the threshold is the effect of the last of the best so many verified.
    population: sites that nobody verified. missed_mean, bound_mean: of those, how many are above
    the threshold in truth, and by the bound. too_low: audits in which more are than the bound says.
    """

    metric: str
    pairs_of: str
    screen: str
    cut: str
    population: int
    sample: int
    audits: int
    missed_mean: float
    bound_mean: float
    too_low: int


Key = tuple[str, str]
Ranking = Callable[[np.random.Generator], np.ndarray]


def screens(
    scores: Scores, screened: Mapping[str, float]
) -> Iterator[tuple[str, np.ndarray, Ranking]]:
    """A name, what is true of each site, and what ranks: the plain screen of the same pairs; exact
    effects of few other pairs, a worse screen than that; and no knowledge at all."""
    same = scores.of(scores.seeds < FEW).means
    fixed = np.array([screened[site] for site in scores.sites])
    yield "plain screen", same, lambda rng: fixed
    half = scores.seeds.max() // 2
    truth = scores.of(scores.seeds <= half).means
    others = np.flatnonzero((scores.seeds > half) & scores.counted)

    def few(count: int) -> Ranking:
        return lambda rng: scores.effects[rng.choice(others, count, replace=False)].mean(0)

    yield "four other pairs", truth, few(4)
    yield "one other pair", truth, few(1)
    yield "random order", truth, lambda rng: rng.standard_normal(len(scores.sites))


def audit_rows(
    found: Mapping[Key, Scores],
    screened: Mapping[Key, Mapping[str, float]],
    keys: Sequence[Key] = tuple(product(METRICS, ATTRIBUTES)),
) -> Iterator[AuditRow]:
    """keys: metric and attribute."""
    for key in keys:
        scores = found[key]
        for name, truth, ranking in screens(scores, screened[key]):
            for share, cut in ((TENTH, "best tenth"), (THIRD, "best third")):
                for sample in SAMPLES:
                    yield _row(scores, name, truth, ranking, share, cut, sample)


def _row(
    scores: Scores,
    name: str,
    truth: np.ndarray,
    ranking: Ranking,
    share: float,
    cut: str,
    sample: int,
) -> AuditRow:
    always = [i for i, kind in enumerate(scores.kinds) if kind == "resnet"]
    rest = [i for i, kind in enumerate(scores.kinds) if kind != "resnet"]
    top = ceil(TOP_SHARE * len(rest))
    tally = []
    for seed in range(AUDITS):
        values = ranking(np.random.default_rng(seed))
        order = sorted(rest, key=lambda i: -values[i])
        verified, others = [*always, *order[:top]], sorted(order[top:])
        best = sorted((truth[i] for i in verified), reverse=True)
        threshold = best[max(1, round(share * len(truth))) - 1]
        drawn = draw([str(i) for i in others], sample, seed)
        above = sum(bool(truth[int(i)] > threshold) for i in drawn)
        missed = sum(bool(truth[i] > threshold) for i in others)
        tally.append((missed, audit(len(others), len(drawn), above).bound))
    missed, bounds = np.array(tally).T
    return AuditRow(
        metric=scores.metric,
        pairs_of=scores.group,
        screen=name,
        cut=cut,
        population=len(rest) - top,
        sample=sample,
        audits=AUDITS,
        missed_mean=float(missed.mean()),
        bound_mean=float(bounds.mean()),
        too_low=int((missed > bounds).sum()),
    )


def audit_table(rows: Sequence[AuditRow]) -> str:
    """The worst of all metrics and attributes, by screen, threshold and sample."""
    heads = (
        "ranked by",
        "threshold",
        "checked of",
        "missed, mean",
        "bound, mean",
        "bound too low, of 200, worst",
        "mean",
    )
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    kinds = dict.fromkeys((r.screen, r.cut, r.sample, r.population) for r in rows)
    for screen, cut, sample, population in sorted(kinds):
        own = [r for r in rows if (r.screen, r.cut, r.sample) == (screen, cut, sample)]
        lines.append(
            f"| {screen} | {cut} | {sample} of {population} | "
            f"{np.mean([r.missed_mean for r in own]):.2f} | "
            f"{np.mean([r.bound_mean for r in own]):.1f} | {max(r.too_low for r in own)} | "
            f"{np.mean([r.too_low for r in own]):.1f} |"
        )
    return "\n".join(lines)
