"""The bound on what a screen missed: by hand, by counting every sample, and by simulation."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasttrace.attribution.audit import audit, draw, most_above
from fasttrace.errors import UsageError


def test_by_hand():
    # Of 20 places 10 are drawn and none is above. With D above, the chance of that is
    # C(20 - D, 10) / C(20, 10): 0.0433 at D = 4 and 0.1053 at D = 3.
    assert most_above(20, 10, 0) == 3
    # A sample of one says almost nothing: none above has the chance (R - D) / R, 0.1 at 18 of 20.
    assert most_above(20, 1, 0) == 18
    assert most_above(20, 1, 1) == 20
    assert most_above(7, 7, 2) == 2
    assert most_above(7, 0, 0) == 7
    assert most_above(0, 0, 0) == 0


@given(st.integers(1, 8), st.data())
def test_coverage_over_every_sample(population, data):
    """The chance that the bound is below the truth, over all samples there are: at most 5 %."""
    sample = data.draw(st.integers(0, population))
    marked = data.draw(st.integers(0, population))
    confidence = data.draw(st.sampled_from([0.5, 0.8, 0.95]))
    samples = list(combinations(range(population), sample))
    below = [
        most_above(population, sample, sum(i < marked for i in one), confidence) < marked
        for one in samples
    ]
    assert sum(below) <= (1 - confidence) * len(samples) + 1e-9


def test_the_bound_is_no_larger_than_it_has_to_be():
    """One place fewer would be below the truth too often."""
    for population, sample in ((30, 10), (55, 20), (200, 40)):
        for above in range(3):
            bound = most_above(population, sample, above)
            ways = [
                sum(
                    i < bound + 1 for i in np.random.default_rng(s).permutation(population)[:sample]
                )
                <= above
                for s in range(4000)
            ]
            assert np.mean(ways) < 0.065  # at one more the chance is 5 % at most, and 4000 draws


def test_two_hundred_audits():
    """Effects drawn once, a threshold, 200 seeds: the truth is above the bound in about 5 %."""
    effects = np.random.default_rng(0).standard_normal(60)
    names = [str(i) for i in range(60)]
    truth = int((effects > 1.0).sum())
    assert truth >= 5
    missed = 0
    for seed in range(200):
        drawn = draw(names, 20, seed)
        above = sum(effects[int(name)] > 1.0 for name in drawn)
        missed += truth > audit(60, len(drawn), above).bound
    assert 0 < missed <= 18


def test_a_sample_is_fair_and_the_same_again():
    names = [f"site {i}" for i in range(12)]
    times = dict.fromkeys(names, 0)
    for seed in range(3000):
        drawn = draw(names, 4, seed)
        assert drawn == sorted(drawn, key=names.index)
        assert len(set(drawn)) == 4
        for name in drawn:
            times[name] += 1
    assert max(abs(n - 1000) for n in times.values()) < 4 * np.sqrt(3000 * (1 / 3) * (2 / 3))
    assert draw(names, 4, 7) == draw(names, 4, 7)
    assert draw(names, 12, 0) == names
    assert draw(names, 99, 0) == names
    assert draw(names, 0, 0) == []


def test_words():
    assert "at most 3 of the 20" in str(audit(20, 10, 0))
    assert "at most 3 are still unknown" in str(audit(20, 10, 0))
    assert "Nothing was audited" in str(audit(20, 0, 0))
    assert "none left to miss" in str(audit(20, 20, 2))
    assert "Every place" in str(audit(0, 0, 0))


def test_many_places():
    assert most_above(332_800, 400, 0) == most_above(332_800, 400, 0, 0.95)
    # About 3 / 400 of them (the rule of three).
    assert most_above(332_800, 400, 0) == pytest.approx(332_800 * 3 / 400, rel=0.01)


@pytest.mark.parametrize("numbers", [(5, 6, 0), (5, 3, 4), (5, 3, -1)])
def test_impossible_numbers(numbers):
    with pytest.raises(UsageError, match="can't come from"):
        most_above(*numbers)


def test_bad_input():
    with pytest.raises(UsageError, match="confidence"):
        most_above(5, 3, 0, 1.0)
    for count in (-1, 2.5, True):
        with pytest.raises(UsageError, match="whole number"):
            draw(["a"], count, 0)
