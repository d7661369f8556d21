"""The statistics of adaptive sweeps: by hand, against a slow twin, and by counting right sets."""

from __future__ import annotations

from math import inf, isnan, pi, sqrt, tan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrace.attribution.adaptive import CLEAR, Race, looks, pull_order, run_race
from fasttrace.attribution.goal import Goal, parse_goal
from fasttrace.attribution.student import quantile, upper_tail
from fasttrace.errors import UsageError


def race_on(effects, top, order=None, **options):
    """effects [N, K]; to the end."""
    pairs, arms = effects.shape
    order = list(range(pairs)) if order is None else order
    race = Race(range(arms), top, pairs, **options)
    return run_race(race, lambda asked, pair: {arm: effects[order[pair], arm] for arm in asked})


def top_of(effects, top):
    return set(np.argsort(-effects.mean(0), kind="stable")[:top].tolist())


# ---- Student's t


def test_quantiles():
    for risk in (0.4, 0.1, 1e-3, 1e-7):
        assert quantile(risk, 1) == pytest.approx(tan(pi * (0.5 - risk)), rel=1e-9)
        two = (1 - 2 * risk) * sqrt(2 / (1 - (1 - 2 * risk) ** 2))
        assert quantile(risk, 2) == pytest.approx(two, rel=1e-7)
    # From printed tables.
    assert quantile(0.025, 4) == pytest.approx(2.776445, abs=1e-6)
    assert quantile(0.005, 10) == pytest.approx(3.169273, abs=1e-6)
    assert quantile(0.0005, 30) == pytest.approx(3.645959, abs=1e-6)
    assert quantile(0.025, 1e7) == pytest.approx(1.959964, abs=1e-5)
    assert quantile(0.5, 5) == pytest.approx(0, abs=1e-9)


@given(st.floats(1e-9, 0.49), st.integers(1, 200))
def test_a_quantile_has_its_tail(risk, freedom):
    assert upper_tail(quantile(risk, freedom), freedom) == pytest.approx(risk, rel=1e-6)


# ---- the race


def test_looks_and_orders():
    assert looks(24) == [5, 8, 12, 18]
    assert looks(6) == [5]
    assert looks(5) == []
    assert looks(100, 4, 2.0) == [4, 8, 16, 32, 64]
    assert looks(8, 2, 1.0) == [2, 3, 4, 5, 6, 7]
    assert sorted(pull_order(30, 1)) == list(range(30))
    assert pull_order(30, 1) != pull_order(30, 2)


def test_clear_arms_are_settled_at_the_first_look():
    noise = 1e-3 * np.random.default_rng(0).standard_normal((40, 6))
    effects = np.array([5, 0, 3, 1, 4, 2.0]) + noise
    found = race_on(effects, 2)
    assert found.top == (0, 4)
    assert found.settled
    assert found.why == "settled"
    assert (found.visited, found.looks) == (5, 1)
    assert found.spent == 5 * (6 + 2)
    assert found.exhaustive == 40 * (6 + 2)
    states = {s.arm: s.state for s in found.standings}
    assert states == {0: "in", 4: "in", 1: "out", 2: "out", 3: "out", 5: "out"}
    lead = {s.arm: s.lead for s in found.standings}
    assert lead[4] == pytest.approx(1, abs=0.01)  # ahead of the best of the others, 3
    assert lead[2] == pytest.approx(-1, abs=0.01)
    assert all(abs(s.lead) > s.half for s in found.standings)
    assert "Settled with 95 % confidence" in str(found)


def test_settled_arms_are_not_asked_for_again():
    rng = np.random.default_rng(8)
    effects = np.array([2.0, 2.0, 2.05, -5, -6, -7]) + 0.5 * rng.standard_normal((60, 6))
    asked = []
    race = Race(range(6), 2, 60)

    def pull(arms, pair):
        asked.append((pair, tuple(arms)))
        return {arm: effects[pair, arm] for arm in arms}

    found = run_race(race, pull)
    assert [pair for pair, _ in asked] == list(range(found.visited))
    assert asked[0][1] == (0, 1, 2, 3, 4, 5)
    assert asked[5][1] == (0, 1, 2)  # the others lie seven below, with a noise of a half
    assert found.spent == sum(len(arms) + 2 for _, arms in asked)
    pairs = {s.arm: s.pairs for s in found.standings}
    assert pairs[0] > pairs[3]


def test_equal_arms_take_every_pair_and_the_result_is_exact():
    effects = np.random.default_rng(2).standard_normal((24, 10))
    found = race_on(effects, 3)
    assert found.why == "every pair"
    assert found.settled
    assert set(found.top) == top_of(effects, 3)
    assert "All 24 pairs" in str(found)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(1, 20), st.data())
def test_whatever_takes_every_pair_is_exact(seed, arms, pairs, data):
    top = data.draw(st.integers(1, arms - 1))
    rng = np.random.default_rng(seed)
    effects = rng.standard_normal(arms) + rng.standard_normal((pairs, arms))
    found = race_on(effects, top)
    assert len(found.top) == top
    assert sum(s.state == "in" for s in found.standings) == top
    if found.why == "every pair":
        # What was settled before was so on fewer pairs; of the rest the best are in.
        rest = [s for s in found.standings if s.pairs == pairs]
        means = {s.arm: effects[:, s.arm].mean() for s in rest}
        inside = [means[s.arm] for s in rest if s.state == "in"]
        outside = [means[s.arm] for s in rest if s.state == "out"]
        if inside and outside:
            assert min(inside) >= max(outside)


def slow_look(effects, alive, places, pairs, risk):
    """One look in plain loops: arms that are in, and arms that are out."""
    n = len(effects)

    def surely_better(one, other):
        d = [row[one] - row[other] for row in effects]
        mean = sum(d) / n
        sd = sqrt(sum((x - mean) ** 2 for x in d) / (n - 1))
        return mean - quantile(risk, n - 1) * sd * sqrt((1 - n / pairs) / n) > 0 < mean

    inside, outside = [], []
    for arm in alive:
        rest = [other for other in alive if other != arm]
        if sum(surely_better(other, arm) for other in rest) >= places:
            outside.append(arm)
        elif sum(surely_better(arm, other) for other in rest) >= len(alive) - places:
            inside.append(arm)
    return inside, outside


@pytest.mark.parametrize("seed", range(6))
def test_looks_against_the_slow_twin(seed):
    rng = np.random.default_rng(seed)
    pairs, arms, top = 30, 9, 3
    effects = 0.5 * rng.standard_normal(arms) + 0.2 * rng.standard_normal((pairs, arms))
    race = Race(range(arms), top, pairs)
    every = looks(pairs)
    alive, inside, expected = list(range(arms)), [], {}
    for number, pair in enumerate(effects[: every[-1]], start=1):
        if race.done:
            break
        race.tell(dict(enumerate(pair)))
        if number not in every:
            continue
        for level in (CLEAR, 1 - CLEAR):
            need = top - len(inside)
            count = top * (arms - top) if level == CLEAR else need * (len(alive) - need)
            risk = level * 0.05 / len(every) / count
            won, lost = slow_look(effects[:number], alive, need, pairs, risk)
            inside += won
            alive = [arm for arm in alive if arm not in (*won, *lost)]
            expected |= dict.fromkeys(won, "in") | dict.fromkeys(lost, "out")
            need = top - len(inside)
            if need in (0, len(alive)):
                expected |= dict.fromkeys(alive, "in" if need else "out")
                break
        assert {a: s for a, s in race.states.items() if s != "open"} == expected
        if need in (0, len(alive)):
            break
    assert expected  # something was settled before the end


# ---- how often the set is right

KINDS = {
    "spread out": lambda rng, n: -0.15 * np.arange(20) + rng.standard_normal((n, 20)),
    "eight tied": lambda rng, n: np.repeat([0.0, -1.0], [8, 12]) + rng.standard_normal((n, 20)),
    "half tied": lambda rng, n: np.repeat([0.0, -0.5], [10, 10]) + rng.standard_normal((n, 20)),
    "unequal noise": lambda rng, n: (
        -0.1 * np.arange(20) + rng.standard_normal((n, 20)) * (0.1 + 2 * rng.random(20))
    ),
    "common noise": lambda rng, n: (
        -0.1 * np.arange(20) + 3 * rng.standard_normal((n, 1)) + 0.4 * rng.standard_normal((n, 20))
    ),
    "skewed": lambda rng, n: -0.2 * np.arange(20) + rng.exponential(1, (n, 20)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pairs", [24, 96])
def test_the_right_set(kind, pairs):
    """At 95 % at most 18 of 200 wrong sets: a true 5 % exceeds that in 1 of 100 tests."""
    right, share = 0, []
    for seed in range(200):
        rng = np.random.default_rng([seed, pairs])
        effects = KINDS[kind](rng, pairs)
        found = race_on(effects, 2, pull_order(pairs, seed))
        right += set(found.top) == top_of(effects, 2)
        share.append(found.share)
    assert right >= 182
    assert np.mean(share) < 1


def test_common_noise_costs_nothing():
    """A pair's own level, the same for all arms, cancels in the differences."""
    rng = np.random.default_rng(3)
    effects = -np.arange(12) + 0.3 * rng.standard_normal((60, 12))
    plain = race_on(effects, 3)
    shifted = race_on(effects + 1000 * rng.standard_normal((60, 1)), 3)
    assert shifted.spent == plain.spent < 0.3 * plain.exhaustive
    assert shifted.top == plain.top


# ---- ends and refusals


def test_a_budget_ends_it_and_more_of_it_says_more():
    rng = np.random.default_rng(4)
    effects = -0.3 * np.arange(10) + rng.standard_normal((50, 10))
    before = -1
    for budget in (12, 59, 60, 130, 200, 300, 10_000):
        found = race_on(effects, 3, budget=budget)
        assert found.spent <= budget
        decided = sum(s.state != "open" for s in found.standings)
        assert decided >= before
        before = decided
        if found.why == "budget":
            assert "The budget is spent" in str(found)
            assert len(found.top) == 3
            assert found.open
    assert found.settled
    nothing = race_on(effects, 3, budget=11)
    assert (nothing.spent, nothing.visited) == (0, 0)
    assert all(isnan(s.effect) and s.half == inf for s in nothing.standings)
    assert race_on(effects, 3, budget=59).visited == 4


def test_pairs_that_say_nothing_are_visited_and_not_counted():
    rng = np.random.default_rng(5)
    effects = -np.arange(5) + 0.1 * rng.standard_normal((30, 5))
    race = Race(range(5), 1, 30)
    found = run_race(
        race, lambda arms, pair: None if pair % 2 else {arm: effects[pair, arm] for arm in arms}
    )
    assert found.top == (0,)
    assert found.counted < found.visited
    assert found.standings[0].pairs == found.counted
    empty = run_race(Race(range(5), 1, 4), lambda arms, pair: None)
    assert not empty.settled
    assert "None of the 4 pairs has anything to restore" in str(empty)


def test_anytime():
    race = Race("abc", 1, 10)
    assert "Not settled yet" in str(race.result())
    race.tell({"a": 1, "b": 3, "c": 2})
    found = race.result()
    assert found.top == ("b",)
    assert [s.arm for s in found.standings] == ["b", "c", "a"]
    assert (found.spent, found.exhaustive, found.why) == (5, 50, "under way")


def test_costs_and_noise():
    effects = np.array([1.0, 0.5, 0.0]) + 1e-9 * np.random.default_rng(6).standard_normal((30, 3))
    free = race_on(effects, 1, costs={0: 1, 1: 1, 2: 0})
    assert (free.spent, free.exhaustive) == (5 * 4, 30 * 4)
    # Scores that are only good to 10 can't tell a difference of half.
    assert race_on(effects, 1, noise=10.0).why == "every pair"


@pytest.mark.parametrize(
    ("text", "goal"),
    [
        ("top10%@95", Goal(10, True, 0.95)),
        ("top10%", Goal(10, True, 0.95)),
        ("top5@99.5", Goal(5, False, 0.995)),
        (" top 3 ", Goal(3, False, 0.95)),
        ("top2.5%@90%", Goal(2.5, True, 0.9)),
    ],
)
def test_goals(text, goal):
    assert parse_goal(text) == goal


def test_counts_of_goals():
    assert parse_goal("top10%").count(32) == 3
    assert parse_goal("top10%").count(4) == 1
    assert parse_goal("top3").count(4) == 3
    with pytest.raises(UsageError, match="no choice"):
        parse_goal("top3").count(3)
    with pytest.raises(UsageError, match="no choice"):
        parse_goal("top10%").count(1)


@pytest.mark.parametrize(
    "text", ["", "10%", "top", "top0", "top2.5", "top100%", "top5@100", "top5@30", "top5@x", "topx"]
)
def test_goals_that_are_none(text):
    with pytest.raises(UsageError, match="can't be read"):
        parse_goal(text)


def test_bad_races():
    with pytest.raises(UsageError, match="1 to 2 of 3 places"):
        Race("abc", 3, 5)
    with pytest.raises(UsageError, match="places"):
        Race("aab", 1, 5)
    with pytest.raises(UsageError, match="at least one pair"):
        Race("abc", 1, 0)
    with pytest.raises(UsageError, match="budget"):
        Race("abc", 1, 5, budget=0)
    race = Race("ab", 1, 1)
    with pytest.raises(ValueError, match="no effect"):
        race.tell({"a": 1.0})
    race.tell({"a": 1.0, "b": 0.0})
    assert race.wanted() is None
    with pytest.raises(ValueError, match="over"):
        race.tell({"a": 1.0, "b": 0.0})


def test_half_of_the_interval_by_hand():
    """Two arms: four fifths of the risk of one look go to the one comparison there is."""
    difference = np.array([1.0, -1.0, 2.0, 0.0, 0.5])
    race = Race("ab", 1, 20)
    for d in difference:
        race.tell({"a": d, "b": 0.0})
    assert race.looks == [5, 8, 12, 18]
    half = quantile(0.8 * 0.05 / 4, 4) * difference.std(ddof=1) * sqrt((1 - 5 / 20) / 5)
    first = race.result().standings[0]
    assert (first.arm, first.state) == ("a", "open")
    assert first.half == pytest.approx(half, rel=1e-9)
    assert first.lead == pytest.approx(0.5, rel=1e-9)
