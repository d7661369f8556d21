"""Screens that are held against exact patches, each kept in a file as those are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from attribution_exact import METRIC, Arrays, Kept, Named, keep_all, seeds_of

from fasttrace import Corruption, Probe, Tracer
from fasttrace.attribution.result import Screen

LEVELS = ("site", "head", "channel")


@dataclass(frozen=True)
class Screened:
    """A screen of one (probe, seed) by one estimator, in `Tracer.sites()` order.

    sites [calls, sites]; heads [attentions, heads] and channels (one site behind the other), over
    all calls; both empty where they weren't asked for. generations: what it cost.
    """

    sites: np.ndarray
    heads: np.ndarray
    channels: np.ndarray
    generations: float

    def of(self, window: tuple[int, int]) -> np.ndarray:
        found: np.ndarray = self.sites[slice(*window)].sum(0)
        return found


def screened(
    tracer: Tracer,
    kept: Kept,
    probe: Probe,
    seed: int,
    sigma: float,
    *,
    metric: str = METRIC,
    estimator: str = "plain",
    parts: bool = False,
) -> Screened:
    """sigma: of the corruption, the one that exact patches were made with. parts: heads, channels
    too."""
    pair = probe, seed
    found = screens(tracer, kept, [pair], sigma, metric=metric, estimator=estimator, parts=parts)
    return found[pair]


def screens(
    tracer: Tracer,
    kept: Kept,
    pairs: Sequence[Named],
    sigma: float,
    *,
    metric: str = METRIC,
    estimator: str = "plain",
    parts: bool = False,
) -> dict[Named, Screened]:
    """Of several pairs: those that are not kept are screened together, for less overhead."""

    def make(missing: list[Named]) -> dict[Named, Arrays]:
        seeds = seeds_of(missing)
        found = tracer.screen(
            list(seeds),
            seeds=seeds,
            metric=metric,
            estimator=estimator,
            corruption=Corruption(sigma=sigma),
            by=LEVELS if parts else "site",
        )
        return {
            (pair.probe, pair.seed): {
                "sites": _per_call(found, i),
                "heads": _of(found, "head", i),
                "channels": _of(found, "channel", i),
                "generations": np.array(found.generations),
            }
            for i, pair in enumerate(found.pairs)
        }

    def named(pair: Named, parts: bool) -> str:
        return f"screen {pair[0]} {pair[1]} {sigma} {metric} {estimator} {parts}"

    def name(pair: Named) -> str:
        """A screen of parts says the same of whole sites."""
        return named(pair, parts or kept.has(named(pair, True)))

    return {
        pair: Screened(got["sites"], got["heads"], got["channels"], float(got["generations"]))
        for pair, got in keep_all(kept, pairs, name, make).items()
    }


def screened_text(
    tracer: Tracer, kept: Kept, pair: Named, sigma: float, estimator: str = "plain"
) -> tuple[Arrays, float]:
    """Scores of every token by text-encoder site, and generations."""
    probe, seed = pair

    def make() -> Arrays:
        found = tracer.screen(
            [probe],
            seeds=[seed],
            metric=METRIC,
            estimator=estimator,
            component="text_encoder",
            corruption=Corruption(sigma=sigma),
        )
        own = {r.site: found.effects(r)[0] for r in found.readings}
        return own | {"generations": np.array(found.generations)}

    got = dict(kept.get(f"screen of text {probe} {seed} {sigma} {estimator}", make))
    return got, float(got.pop("generations"))


def _per_call(found: Screen, pair: int) -> np.ndarray:
    own = [r for r in found.readings if r.axis == "all"]
    return np.stack([found.scores[r.key][pair, 0, :, 0] for r in own], 1).astype(np.float64)


def _of(found: Screen, axis: str, pair: int) -> np.ndarray:
    own = [found.effects(r)[pair] for r in found.readings if r.axis == axis]
    return np.zeros(0) if not own else np.stack(own) if axis == "head" else np.concatenate(own)
