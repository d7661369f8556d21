"""Intervals and tests: how far a mean over few prompts can be trusted.

Interval: 95 % percentile bootstrap over prompts from 5 prompts on, else over seeds (within each
prompt) from 5 seeds on, else none. With few units such intervals are somewhat too narrow.

Test: sign-flip permutation test, one-sided, of "the effect exceeds the noise floor": under the
null hypothesis each unit's effect minus the floor is symmetric about 0 (Fisher's randomisation
test; exact to 12 units, else Monte Carlo counted as (b + 1) / (B + 1), Phipson and Smyth 2010). The
units are those of the interval. Adjusted by Holm (1979) over the sites of one component within one
group.

Arrays are [P, S] (prompts, seeds) or [C, P, S] (sites first), absent values NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Unit = Literal["prompts", "seeds", "none"]
MIN_UNITS = 5
EXACT_UNITS = 12
RESAMPLES = 4000
LEAST_DRAWS, MOST_DRAWS = 9_999, 99_999


def prompt_means(values: Array) -> Array:
    """[..., P, S] -> [..., P]: the mean over seeds inside each prompt; NaN where there is none."""
    present = ~np.isnan(values)
    number = present.sum(-1)
    total = np.where(present, values, 0.0).sum(-1)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def resampling_units(
    present: Mask,
) -> tuple[Unit, int]:
    """[P, S] -> what can be resampled: at least 5 prompts, else at least 5 seeds in each prompt."""
    per_prompt = present.sum(-1)
    per_prompt = per_prompt[per_prompt > 0]
    if len(per_prompt) >= MIN_UNITS:
        return "prompts", len(per_prompt)
    if len(per_prompt) and per_prompt.min() >= MIN_UNITS:
        return "seeds", int(per_prompt.sum())
    return "none", int(per_prompt.sum())


def unit_weights(present: Mask) -> Array:
    """[P, S] -> each pair's weight in the AIE: 1 / (prompts x the prompt's seeds)."""
    per_prompt = present.sum(-1, keepdims=True)
    share = np.where(present, 1.0 / np.maximum(per_prompt, 1), 0.0)
    return share / max(1, int((per_prompt > 0).sum()))


def bootstrap_weights(
    present: Mask, unit: str, rng: np.random.Generator, resamples: int = RESAMPLES
) -> Array:
    """[resamples, P, S]: the weight of each pair in each resampled AIE."""
    weights = np.zeros((resamples, *present.shape))
    filled = np.flatnonzero(present.any(-1))
    if unit == "prompts":
        drawn = rng.integers(0, len(filled), (resamples, len(filled)))
        times = np.stack([(drawn == i).sum(-1) for i in range(len(filled))], -1)
        weights[:, filled] = times[..., None] * unit_weights(present)[filled]
        return weights
    for p in filled:
        own = np.flatnonzero(present[p])
        drawn = rng.integers(0, len(own), (resamples, len(own)))
        times = np.stack([(drawn == i).sum(-1) for i in range(len(own))], -1)
        weights[:, p, own] = times / (len(own) * len(filled))
    return weights


def percentiles(
    weights: Array, values: Array, present: Mask, totals: Array | None = None
) -> tuple[Array, Array]:
    """[C, P, S] -> ends [C] of the resampled means, or of their ratio to those of `totals`."""
    means = weights[:, present] @ np.nan_to_num(values[:, present]).T
    if totals is not None:
        means = means / (weights[:, present] @ np.nan_to_num(totals[:, present]).T)
    low, high = np.percentile(means, (2.5, 97.5), axis=0)
    return low, high


def sign_flip_p(values: Array, present: Mask, unit: str, rng: np.random.Generator) -> Array:
    """[C, P, S] -> [C]: one-sided p of "the AIE is above 0", signs of prompts or pairs flipped."""
    if unit == "prompts":
        parts = prompt_means(values)[:, present.any(-1)]
        parts = parts / parts.shape[1]
    else:
        parts = values[:, present] * unit_weights(present)[present]
    cells, n = parts.shape
    observed = parts.sum(-1)
    slack = 1e-12 * np.abs(parts).sum(-1)  # sums in another order differ in the last bits
    if n <= EXACT_UNITS:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return np.asarray((parts @ signs.T >= (observed - slack)[:, None]).mean(-1))
    draws = _draws(cells)
    hits, left = np.zeros(cells), draws
    while left:
        size = min(left, 4096)
        signs = rng.choice(np.array([-1.0, 1.0]), (size, n))
        hits += (parts @ signs.T >= (observed - slack)[:, None]).sum(-1)
        left -= size
    return np.asarray((hits + 1) / (draws + 1))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the order given."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, running = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = running
    return adjusted


def smallest_p(units: int, tests: int) -> float:
    """The smallest p the sign-flip test can give with this many units and sites."""
    exact = 2.0**-units
    return exact if units <= EXACT_UNITS else max(exact, 1.0 / (_draws(tests) + 1))


def _draws(tests: int) -> int:
    # Holm needs p <= 0.05 / tests from the strongest site: at least 20 draws a site.
    return min(MOST_DRAWS, max(LEAST_DRAWS, 40 * tests))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rho, ties at their mean rank; NaN where one side is constant or too short."""
    if len(first) < 3:
        return float("nan")
    a, b = _ranks(np.asarray(first, float)), _ranks(np.asarray(second, float))
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / scale if scale > 0 else float("nan")


def _ranks(values: Array) -> Array:
    below = (values[:, None] > values[None, :]).sum(-1)
    equal = (values[:, None] == values[None, :]).sum(-1)
    return np.asarray(below + (equal - 1) / 2.0)
