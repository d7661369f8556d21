"""Whole sites, screened against exact: which pairs are compared, and rank correlations by group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
from adaptive_scores import FILE

from fasttrace import Probe
from fasttrace.report.uncertainty import rank_correlation

TENTH = 0.1
GROUPS = {
    "attention and feed-forward": ("attn1", "attn2", "ff"),
    "all sites": ("resnet", "attn1", "attn2", "ff"),
    "ResNets": ("resnet",),
    "self-attention": ("attn1",),
    "cross-attention": ("attn2",),
    "feed-forward": ("ff",),
}


@dataclass(frozen=True)
class Pair:
    """One (probe, seed) with exact effects [sites] of all-call patches, in `Tracer.sites()` order.

    total, floor: the pair's total effect and noise floor, in the metric's unit.
    """

    probe: Probe
    seed: int
    effects: np.ndarray
    total: float
    floor: float


def stored(metric: str) -> dict[str, list[Pair]]:
    """Exact effects by attribute from exhaustive.parquet: seed by seed, prompts in turn."""
    table = pq.read_table(FILE, filters=[("metric", "=", metric)]).to_pydict()
    rows: dict[tuple, dict[int, int]] = {}
    for i, seed in enumerate(table["seed"]):
        words = tuple(table[name][i] for name in ("prompt", "subject", "attribute"))
        rows.setdefault((seed, *words), {})[table["site_index"][i]] = i
    found: dict[str, list[Pair]] = {}
    for (seed, prompt, subject, attribute), own in sorted(
        rows.items(), key=lambda item: item[0][0]
    ):
        at = [own[s] for s in sorted(own)]
        total, floor = (float(table[name][at[0]]) for name in ("total_effect", "noise_floor"))
        effects = np.array([table["effect"][i] for i in at], np.float64)
        pair = Pair(Probe(prompt, subject, attribute), seed, effects, total, floor)
        found.setdefault(attribute, []).append(pair)
    return found


def chosen(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """The first `count` in which the corruption does something: the total effect is above the noise
    floor and above a tenth of the median over all pairs (above 0 where that is negative)."""
    least = max(0.0, TENTH * float(np.median([pair.total for pair in pairs])))
    return [pair for pair in pairs if pair.total > max(pair.floor, least)][:count]


def by_group(
    kinds: Sequence[str], compared: Iterable[tuple[np.ndarray, np.ndarray]]
) -> dict[str, tuple[float, float, int]]:
    """Of pairs of (screened, exact) effects [sites]: mean and least rank correlation, and how many
    pairs have one (all exact effects being equal, there is none)."""
    of = np.array(kinds)
    both = list(compared)
    found = {}
    for group, own in GROUPS.items():
        mask = np.isin(of, own)
        rhos = [rank_correlation(s[mask].tolist(), e[mask].tolist()) for s, e in both]
        known = [rho for rho in rhos if not np.isnan(rho)]
        if known:
            found[group] = float(np.mean(known)), min(known), len(known)
    return found
