"""Averages, intervals and tests against numbers worked out by hand and against plain loops."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrace.errors import UsageError
from fasttrace.report import uncertainty
from fasttrace.report.statistics import average_effects, default_minimum
from fasttrace.report.text import percent, share_interval

GRID = 0.25  # effects on a grid of exact binary fractions, so that ties are ties


@pytest.fixture
def make(fakes):
    """A row of one site with a given effect: total effect 4, corrupt score 10."""
    first = next(fakes.fake_sweep())

    def row(effect, *, prompt="p0", seed=0, site="unet.a", total=4.0, attribute="object", **more):
        corrupt = 10.0
        return replace(
            first,
            key=f"{prompt}{seed}{site}{attribute}{more}",
            prompt=prompt,
            attribute=attribute,
            seed=seed,
            site=site,
            site_index={"unet.a": 0, "unet.b": 1, "unet.c": 2}.get(site, 9),
            score=corrupt + effect,
            corrupt_score=corrupt,
            clean_score=corrupt + total,
            total_effect=total,
            effect=effect,
            normalised_effect=effect / total if total else None,
            noise_floor=0.01,
            **more,
        )

    return row


def test_seeds_are_averaged_inside_prompts(make):
    """Two prompts, one with two seeds: (mean(1, 3) + 8) / 2 = 5, not (1 + 3 + 8) / 3 = 4."""
    rows = [
        make(1.0, prompt="p0", seed=0),
        make(3.0, prompt="p0", seed=1),
        make(8.0, prompt="p1", seed=0, total=16.0),
    ]
    (found,) = average_effects(rows, minimum=0.0)
    assert found.effect == 5.0
    assert found.score == 15.0
    assert found.normalised == (0.5 + 0.5) / 2
    assert (found.prompts, found.pairs, found.excluded) == (2, 3, 0)
    assert found.interval_text == "n = 2, no interval"
    assert found.p is None
    assert not found.testable


def test_pairs_without_a_total_effect_are_left_out_and_counted(make):
    rows = [
        make(1.0, prompt="p0"),
        make(3.0, prompt="p1"),
        make(99.0, prompt="p2", total=0.5),  # at the minimum
        make(99.0, prompt="p3", total=-3.0),
        make(99.0, prompt="p4", total=0.0),
    ]
    (found,) = average_effects(rows, minimum=0.5)
    assert (found.effect, found.prompts, found.excluded) == (2.0, 2, 3)
    (strict,) = average_effects([replace(r, noise_floor=4.0) for r in rows], minimum=0.5)
    assert strict.prompts == 0
    assert math.isnan(strict.effect)
    assert strict.excluded == 5


def test_the_share_is_a_ratio_of_means(make):
    """Effects 6, 6, 6, 6, -2 of totals 10, 10, 10, 10, 1: 22 / 41. Their mean ratio is 0.08."""
    parts = [(6.0, 10.0)] * 4 + [(-2.0, 1.0)]
    rows = [make(e, prompt=f"p{i}", total=t) for i, (e, t) in enumerate(parts)]
    (found,) = average_effects(rows, minimum=0.0)
    assert found.normalised == pytest.approx(22 / 41)
    assert found.normalised_low > 0.0
    # Without the odd prompt every resample gives 24 / 40.
    assert found.normalised_high == pytest.approx(0.6)
    assert share_interval(found) == f"[{percent(found.normalised_low)}, 60 %]"
    assert share_interval(average_effects(rows[:2])[0]) == "n = 2, no interval"


def test_the_default_minimum_is_a_tenth_of_the_median_total_effect(make):
    rows = [make(0.0, prompt=f"p{i}", total=t) for i, t in enumerate((1.0, 4.0, 9.0))]
    rows += [replace(rows[2], site="unet.b")] * 5  # a pair counts once, however many sites it has
    assert default_minimum(rows) == {"clip_score": pytest.approx(0.4)}
    assert default_minimum([make(0.0, total=-5.0)]) == {"clip_score": 0.0}


def test_a_distance_counts_like_any_other_metric(make):
    """Clean 0, corrupt 4, patched 1: its row is turned, three quarters of the way back."""
    row = replace(
        make(0.0), metric="latent_distance", score=1.0, clean_score=0.0, corrupt_score=4.0,
        total_effect=4.0, effect=3.0, normalised_effect=0.75,
    )  # fmt: skip
    (found,) = average_effects([row])
    assert (found.effect, found.normalised, found.score) == (3.0, 0.75, 1.0)


def test_groups_metrics_and_windows_stay_apart(make):
    rows = [
        make(1.0),
        make(2.0, attribute="style"),
        make(3.0, window_stop=5),
        make(4.0, metric="other"),
        make(5.0, site="unet.b"),
    ]
    found = average_effects(rows, minimum=0.0)
    assert sorted(e.effect for e in found) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [e.effect for e in average_effects(rows, by="all", minimum=0.0)][:2] != []
    with pytest.raises(UsageError, match="can't group by 'hat'"):
        average_effects(rows, by="hat")


def plain_aie(values: dict[int, dict[int, float]]) -> float:
    """The reference: {prompt: {seed: effect}}, loops only."""
    total = 0.0
    for seeds in values.values():
        inside = 0.0
        for effect in seeds.values():
            inside += effect
        total += inside / len(seeds)
    return total / len(values)


tables = st.dictionaries(
    st.integers(0, 7),
    st.dictionaries(st.integers(0, 6), st.integers(-8, 24).map(lambda v: v * GRID), min_size=1),
    min_size=1,
    max_size=8,
)


@given(table=tables)
@settings(max_examples=60, deadline=None)
def test_averages_equal_plain_loops(table, fakes):
    first = next(fakes.fake_sweep())
    rows = [
        replace(
            first, key=f"{p} {s}", prompt=f"p{p}", seed=s, effect=e, score=20 + e,
            corrupt_score=20.0, clean_score=28.0, total_effect=8.0, normalised_effect=e / 8,
        )
        for p, seeds in table.items()
        for s, e in seeds.items()
    ]  # fmt: skip
    (found,) = average_effects(rows)
    assert found.effect == pytest.approx(plain_aie(table), abs=1e-12)
    assert found.score == pytest.approx(20 + plain_aie(table), abs=1e-12)
    assert found.normalised == pytest.approx(plain_aie(table) / 8, abs=1e-12)
    enough = len(table) >= 5 or min(len(s) for s in table.values()) >= 5
    assert (found.low is not None) == enough
    if found.low is not None and found.high is not None:
        lowest = min(min(s.values()) for s in table.values())
        highest = max(max(s.values()) for s in table.values())
        assert lowest - 1e-9 <= found.low <= found.high <= highest + 1e-9
        assert found.low <= found.effect + 1e-9
        assert found.high >= found.effect - 1e-9


def plain_sign_flip(effects: list[float]) -> float:
    """The reference: share of all sign patterns whose mean is at least the observed one."""
    observed = sum(effects)
    hits = 0
    patterns = list(itertools.product((1, -1), repeat=len(effects)))
    for pattern in patterns:
        if sum(s * e for s, e in zip(pattern, effects, strict=True)) >= observed - 1e-9:
            hits += 1
    return hits / len(patterns)


@given(effects=st.lists(st.integers(-6, 12).map(lambda v: v * GRID), min_size=5, max_size=9))
@settings(max_examples=60, deadline=None)
def test_sign_flip_over_prompts_equals_plain_loops(effects):
    values = np.array(effects)[None, :, None]
    present = np.ones((len(effects), 1), bool)
    found = uncertainty.sign_flip_p(values, present, "prompts", np.random.default_rng(0))
    assert found[0] == pytest.approx(plain_sign_flip(effects))


def test_sign_flip_over_seeds_weighs_prompts_equally():
    """Two prompts with five seeds: each pair counts a tenth of the mean."""
    values = np.arange(10, dtype=float).reshape(1, 2, 5) - 3.0
    present = np.ones((2, 5), bool)
    found = uncertainty.sign_flip_p(values, present, "seeds", np.random.default_rng(0))
    assert found[0] == pytest.approx(plain_sign_flip(list(values.ravel())))


def test_sign_flip_by_hand():
    """All five positive: only the observed pattern reaches its own sum, 1 of 32."""
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])[None, :, None]
    p = uncertainty.sign_flip_p(values, np.ones((5, 1), bool), "prompts", np.random.default_rng(0))
    assert p[0] == 1 / 32
    assert uncertainty.smallest_p(5, 70) == 1 / 32


def test_monte_carlo_agrees_with_the_exact_test(monkeypatch):
    values = np.random.default_rng(3).normal(0.4, 1.0, (6, 11, 1))
    present = np.ones((11, 1), bool)
    exact = uncertainty.sign_flip_p(values, present, "prompts", np.random.default_rng(0))
    monkeypatch.setattr(uncertainty, "EXACT_UNITS", 4)
    drawn = uncertainty.sign_flip_p(values, present, "prompts", np.random.default_rng(0))
    np.testing.assert_allclose(drawn, exact, atol=5 * 0.5 / math.sqrt(9_999))


def test_the_test_keeps_its_level():
    """Where nothing is causal, p <= 0.05 in at most about 5 % of sites."""
    values = np.random.default_rng(5).normal(0.0, 1.0, (4000, 8, 1))
    p = uncertainty.sign_flip_p(values, np.ones((8, 1), bool), "prompts", np.random.default_rng(0))
    assert (p <= 0.05).mean() < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 4000)


def test_holm_by_hand():
    """p = .01 .04 .03 .005: sorted .005*4 .01*3 .03*2 .04*1, made monotone."""
    assert uncertainty.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert uncertainty.holm([]) == []
    assert uncertainty.holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_what_the_step_down_procedure_rejects(p):
    adjusted = uncertainty.holm(p)
    for alpha in (0.01, 0.05, 0.2):
        rejected = set()
        for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
            if p[i] * (len(p) - rank) > alpha:
                break
            rejected.add(i)
        assert {i for i, a in enumerate(adjusted) if a <= alpha} == rejected


@pytest.mark.parametrize("unit", ["prompts", "seeds"])
def test_bootstrap_weights_are_resampled_averages(unit):
    present = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], bool)
    weights = uncertainty.bootstrap_weights(present, unit, np.random.default_rng(0), 3000)
    np.testing.assert_allclose(weights.sum((1, 2)), 1.0)
    assert not weights[:, ~present].any()
    np.testing.assert_allclose(weights.mean(0), uncertainty.unit_weights(present), atol=0.02)
    if unit == "seeds":  # each prompt keeps its half
        np.testing.assert_allclose(weights.sum(2)[:, :2], 0.5)


def test_intervals_come_from_prompts_else_seeds_else_not_at_all():
    def unit(prompts: int, seeds: int) -> tuple[str, int]:
        return uncertainty.resampling_units(np.ones((prompts, seeds), bool))

    assert unit(5, 1) == ("prompts", 5)
    assert unit(4, 5) == ("seeds", 20)
    assert unit(4, 4) == ("none", 16)
    assert unit(1, 4) == ("none", 4)


def test_the_interval_of_a_known_case():
    """Ten prompts at 0 or 1: the bootstrap mean is binomial / 10, the ends its percentiles."""
    present = np.ones((10, 1), bool)
    values = np.array([0.0, 1.0] * 5)[None, :, None]
    weights = uncertainty.bootstrap_weights(present, "prompts", np.random.default_rng(1), 20_000)
    low, high = uncertainty.percentiles(weights, values, present)
    assert (low[0], high[0]) == (pytest.approx(0.2), pytest.approx(0.8))


def test_enough_prompts_give_a_mark_that_survives_correction(make):
    rows = []
    for p in range(14):
        rows += [
            make(3.0 + 0.1 * p, prompt=f"p{p}", site="unet.a"),
            make(0.5 * (-1) ** p, prompt=f"p{p}", site="unet.b"),
            make(0.005, prompt=f"p{p}", site="unet.c"),
        ]
    strong, weak, nothing = average_effects(rows)
    assert strong.testable
    assert strong.beyond_chance
    assert strong.p_holm == pytest.approx(3 * strong.p)
    assert not weak.beyond_chance
    assert nothing.below_floor
    assert not nothing.beyond_chance
    assert strong.low is not None
    assert strong.low < strong.effect < strong.high


def test_sites_that_were_not_run_are_listed_and_not_tested(make):
    rows = [make(0.0, prompt=f"p{i}", status="zero: causal mask") for i in range(6)]
    rows += [make(1.0, prompt=f"p{i}", site="unet.b") for i in range(6)]
    unrun, run = average_effects(rows)
    assert unrun.status == "zero: causal mask"
    assert unrun.p is None
    assert run.tests == 1


def test_rank_correlation_by_hand():
    """Ranks (1, 2.5, 2.5, 4) and (1, 2, 3, 4): rho = 4.5 / sqrt(4.5 * 5)."""
    found = uncertainty.rank_correlation([1, 5, 5, 9], [2, 3, 4, 5])
    assert found == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(uncertainty.rank_correlation([1, 1, 1], [1, 2, 3]))
