"""Screens that are held against exact patches, each kept in a file as those are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from attribution_exact import Kept

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
    metric: str = "latent_recovery",
    estimator: str = "plain",
    parts: bool = False,
) -> Screened:
    """sigma: of the corruption, the one that exact patches were made with. parts: heads, channels
    too."""

    def make() -> dict[str, np.ndarray]:
        found = tracer.screen(
            [probe],
            seeds=[seed],
            metric=metric,
            estimator=estimator,
            corruption=Corruption(sigma=sigma),
            by=LEVELS if parts else "site",
        )
        return {
            "sites": _per_call(found),
            "heads": _of(found, "head"),
            "channels": _of(found, "channel"),
            "generations": np.array(found.generations),
        }

    asked = f"screen {probe} {seed} {sigma} {metric} {estimator} {parts}"
    got = kept.get(asked, make)
    return Screened(got["sites"], got["heads"], got["channels"], float(got["generations"]))


def screened_text(
    tracer: Tracer, kept: Kept, probe: Probe, seed: int, sigma: float, estimator: str = "plain"
) -> tuple[dict[str, np.ndarray], float]:
    """Scores of every token by text-encoder site, and generations."""

    def make() -> dict[str, np.ndarray]:
        found = tracer.screen(
            [probe],
            seeds=[seed],
            metric="latent_recovery",
            estimator=estimator,
            component="text_encoder",
            corruption=Corruption(sigma=sigma),
        )
        own = {r.site: found.effects(r)[0] for r in found.readings}
        return own | {"generations": np.array(found.generations)}

    got = dict(kept.get(f"screen of text {probe} {seed} {sigma} {estimator}", make))
    return got, float(got.pop("generations"))


def _per_call(found: Screen) -> np.ndarray:
    own = [r for r in found.readings if r.axis == "all"]
    return np.stack([found.scores[r.key][0, 0, :, 0] for r in own], 1).astype(np.float64)


def _of(found: Screen, axis: str) -> np.ndarray:
    own = [found.effects(r)[0] for r in found.readings if r.axis == axis]
    return np.zeros(0) if not own else np.stack(own) if axis == "head" else np.concatenate(own)
