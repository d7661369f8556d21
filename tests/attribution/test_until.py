"""Adaptive sweeps of a tiny pipeline, against the exhaustive table and a race run by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fasttrace import Probe, Tracer
from fasttrace.attribution.adaptive import BESIDE, Race, pull_order, run_race
from fasttrace.attribution.goal import Goal
from fasttrace.attribution.until import SEED, AdaptiveSweep, run_adaptive
from fasttrace.errors import StoreError, UsageError
from fasttrace.plan.lanes import RUN
from fasttrace.report.html import write_report
from fasttrace.report.result import Result
from fasttrace.store.settled import SETTLED, SettledRecord
from fasttrace.testing import tiny_pipeline

PROBES = [
    Probe("a photo of a red dog", "dog", "object"),
    Probe("a drawing of a cat", "cat", "object"),
    Probe("a blue bird", "bird", "object"),
]
ASKED = {"seeds": 8, "steps": 2, "metric": "latent_recovery", "pictures": False}
UNTIL = "top10%@95"


@pytest.fixture(scope="module")
def tracer() -> Tracer:
    return Tracer(tiny_pipeline("sd"))


@pytest.fixture(scope="module")
def plan(tracer):
    return tracer.plan(PROBES, seeds=8, steps=2, metric="latent_recovery")


@pytest.fixture(scope="module")
def full(tracer) -> Result:
    return tracer.trace(PROBES, **ASKED)


@pytest.fixture(scope="module")
def found(tracer) -> Result:
    return tracer.trace(PROBES, **ASKED, until=UNTIL)


@pytest.fixture
def stored(full):
    """Runs a part of a plan from the exhaustive table; `.ran` has the keys."""
    rows = {row.key: row for row in full.rows}

    def run(part):
        for planned in part.rows:
            run.ran.append(planned.key)
            yield rows[planned.key], {}

    run.ran = []
    return run


def matrix(result: Result) -> tuple[np.ndarray, list[str]]:
    """Effects [pairs, sites] in the plan's order."""
    sites = list(dict.fromkeys(row.site for row in result.rows))
    effects = [row.effect for row in result.rows]
    return np.array(effects).reshape(-1, len(sites)), sites


# ---- what is run, and what is decided


def test_rows_are_those_of_the_exhaustive_trace(full, found):
    exhaustive = {row.key: row for row in full.rows}
    keys = [row.key for row in found.rows]
    assert keys == [key for key in exhaustive if key in set(keys)]  # in the plan's order
    assert len(keys) < 0.6 * len(exhaustive)
    for row in found.rows:
        other = exhaustive[row.key]
        assert row.score == pytest.approx(other.score, abs=1e-5)
        assert (row.site, row.seed, row.prompt) == (other.site, other.seed, other.prompt)


def test_decisions_are_those_of_a_race_by_hand(full, found):
    effects, sites = matrix(full)
    order = pull_order(24, SEED)
    pulled = set()

    def pull(arms, pair):
        pulled.update((order[pair], arm) for arm in arms)
        return {arm: effects[order[pair], arm] for arm in arms}

    hand = run_race(Race(range(20), 2, 24, noise=full.noise_floor), pull)
    record = found.until
    assert hand.settled
    assert [sites[s.arm] for s in hand.standings] == [s.site for s in record.sites]
    for mine, its in zip(hand.standings, record.sites, strict=True):
        assert (mine.state, mine.pairs) == (its.state, its.pairs)
        assert mine.effect == pytest.approx(its.effect, abs=1e-5)
        assert mine.lead == pytest.approx(its.lead, abs=1e-5)
        assert mine.half == pytest.approx(its.half, abs=1e-4)
    assert (record.visited, record.spent, record.exhaustive) == (hand.visited, hand.spent, 24 * 22)
    assert record.words == str(hand)
    rows = {row.key: i for i, row in enumerate(full.rows)}
    assert {divmod(rows[row.key], 20) for row in found.rows} == pulled


def test_the_set_is_the_exhaustive_one(full, found):
    effects, sites = matrix(full)
    best = {sites[i] for i in np.argsort(-effects.mean(0))[:2]}
    assert {one.site for one in found.until.top} == best
    assert found.until.settled
    assert [one.state for one in found.until.sites] == ["in"] * 2 + ["out"] * 18


def test_spent_is_what_was_run(found):
    assert all(row.status == RUN for row in found.rows)
    pairs = {(row.prompt, row.seed) for row in found.rows}
    assert found.until.visited == len(pairs)
    assert found.until.spent == len(found.rows) + BESIDE * len(pairs)


# ---- going on


def test_stopped_anywhere_it_goes_on_and_ends_the_same(plan, stored):
    whole = AdaptiveSweep(plan, UNTIL)
    every = [row for row, _ in run_adaptive(whole, stored)]
    for stop in range(0, len(every), 7):
        sweep = AdaptiveSweep(plan, UNTIL, known=every[:stop])
        stored.ran.clear()
        rest = [row for row, _ in run_adaptive(sweep, stored)]
        assert sweep.record == whole.record
        assert stored.ran == [row.key for row in rest]
        assert not {row.key for row in rest} & {row.key for row in every[:stop]}
        assert {row.key for row in (*every[:stop], *rest)} == {row.key for row in every}
    sweep = AdaptiveSweep(plan, UNTIL, known=every)
    assert sweep.wanted() is None
    assert sweep.record == whole.record


def test_an_exhaustive_table_answers_without_a_run(plan, full, found):
    strange = replace(full.rows[0], key="of another plan")
    sweep = AdaptiveSweep(plan, UNTIL, known=[*full.rows, strange])
    assert sweep.wanted() is None
    assert [s.state for s in sweep.record.sites] == [s.state for s in found.until.sites]
    assert sweep.record.spent == found.until.spent
    assert sweep.rows == len(full)


def test_anytime(plan, stored):
    """At each look: what was known before stays, and the sentence says that it isn't the end."""
    sweep = AdaptiveSweep(plan, UNTIL)
    states, visited = {}, []

    def look(part):
        record = sweep.record
        now = {s.site: s.state for s in record.sites if s.state != "open"}
        assert now.items() >= states.items()
        states.update(now)
        visited.append(record.visited)
        assert "Not settled yet" in record.words
        assert all(s.lead is None for s in record.sites) == (record.visited == 0)

    list(run_adaptive(sweep, stored, look))
    assert visited == [0, 5]
    assert "Settled with 95 % confidence" in sweep.record.words


@pytest.mark.parametrize("budget", [22, 43, 44, 100, 131, 10_000])
def test_a_budget_is_kept_to_the_run(plan, stored, budget):
    sweep = AdaptiveSweep(plan, "top3@99", budget)
    rows = [row for row, _ in run_adaptive(sweep, stored)]
    record = sweep.record
    pairs = len({(row.prompt, row.seed) for row in rows})
    assert record.spent == len(rows) + BESIDE * pairs <= budget
    if record.why == "budget":
        assert budget - record.spent < sweep.race.cost_of_a_pair()
        assert "The budget is spent" in record.words
    else:
        assert budget == 10_000
    more = AdaptiveSweep(plan, "top3@99", 10_000, known=rows)
    stored.ran.clear()
    list(run_adaptive(more, stored))
    assert not set(stored.ran) & {row.key for row in rows}


# ---- pairs and places of every sort


def test_pairs_with_nothing_to_restore_are_run_and_not_counted(plan, full, stored):
    dead = {(row.prompt, row.seed) for row in full.rows if row.seed % 2}
    rows = {
        row.key: replace(row, total_effect=0.0) if (row.prompt, row.seed) in dead else row
        for row in full.rows
    }
    sweep = AdaptiveSweep(plan, UNTIL)
    list(run_adaptive(sweep, lambda part: ((rows[r.key], {}) for r in part.rows)))
    record = sweep.record
    assert record.counted < record.visited
    assert max(one.pairs for one in record.sites) == record.counted
    effects, sites = matrix(full)
    alive = [i for i, row in enumerate(full.rows[::20]) if (row.prompt, row.seed) not in dead]
    best = {sites[i] for i in np.argsort(-effects[alive].mean(0))[:2]}
    assert {one.site for one in record.top} == best


def test_a_score_has_noise(plan, full):
    """Differences below the noise floor settle nothing."""
    rows = {row.key: replace(row, noise_floor=0.9) for row in full.rows}
    sweep = AdaptiveSweep(plan, UNTIL)
    list(run_adaptive(sweep, lambda part: ((rows[r.key], {}) for r in part.rows)))
    assert sweep.record.why == "every pair"


def test_token_groups_that_every_prompt_has(tracer):
    asked = {"seeds": 2, "steps": 2, "metric": "latent_recovery", "component": "text_encoder"}
    # The one with the most tokens comes first, so that what others lack isn't seen there.
    found = tracer.trace(PROBES[::-1], **asked, pictures=False, until="top3")
    selectors = {one.selector for one in found.until.sites}
    assert selectors == {"earlier", "last subject", "EOS", "padding"}
    assert {row.selector for row in found.rows} == selectors
    assert found.until.left_out > 0
    assert f"{found.until.left_out} places that only some prompts have" in found.until.words
    hidden = [one for one in found.until.sites if one.selector == "earlier"]
    assert all(one.effect == 0 for one in hidden)
    ran = sum(row.status == RUN for row in found.rows)
    assert found.until.spent >= ran + BESIDE * found.until.visited
    assert found.until.exhaustive < 6 * (BESIDE + len(found.until.sites))  # some need no run


def test_several_metrics_are_scored_and_the_first_decides(tracer):
    asked = {"seeds": 3, "steps": 2, "metric": ["latent_distance", "latent_recovery"]}
    found = tracer.trace(PROBES[0], **asked, sites="attn2", pictures=False, until="top1")
    assert found.until.metric == "latent_distance"
    assert found.metrics == ["latent_distance", "latent_recovery"]
    assert len(found.where(metric="latent_recovery")) == len(found) / 2
    assert found.until.spent == len(found) / 2 + BESIDE * found.until.visited
    best = found.until.top[0]
    rows = found.where(site=best.site, metric="latent_distance").rows
    assert best.effect == pytest.approx(np.mean([row.effect for row in rows]), abs=1e-9)
    assert best.effect > 0  # lower is closer, and still positive is better


def test_swaps_and_another_source(tracer):
    swapped = tracer.swap(
        PROBES[0].prompt, "a cat", seeds=3, steps=2, metric="latent_distance", neighbours=1,
        until="top1", pictures=False,
    )  # fmt: skip
    assert {one.kind for one in swapped.until.sites} == {"attn2"}
    assert swapped.until.pairs == 3
    zeros = tracer.trace(
        PROBES[0], seeds=3, steps=2, metric="latent_distance", sites="attn2", source="zero",
        base="clean", until="top1", pictures=False,
    )  # fmt: skip
    assert {one.selector for one in zeros.until.sites} == {"zero"}
    assert zeros.until.top[0].effect == max(one.effect for one in zeros.until.sites)


# ---- what is said


def test_words_and_folder(found, tmp_path):
    shown = repr(found)
    assert found.until.words in shown
    assert "averages are over different pairs" in shown
    assert shown.splitlines()[3].split()[-1] == "pairs"
    assert found.where(site=found.rows[0].site).until == found.until
    found.save(tmp_path / "out")
    again = Result.open(tmp_path / "out")
    assert again.until == found.until
    (tmp_path / "out" / SETTLED).write_text('{"format": "something"}')
    with pytest.raises(StoreError, match="damaged or from another version"):
        Result.open(tmp_path / "out")


def test_the_page_says_it_site_by_site(found, full, tmp_path):
    found.save(tmp_path / "some")
    page = write_report(tmp_path / "some").read_text()
    assert f"<code>{found.until.until}</code>: {found.until.words}" in page
    section = page[page.index('<h2 id="settled">') : page.index('<h2 id="causal">')]
    assert section.count("<td>in</td>") == 2
    assert section.count("<td>out</td>") == 18
    for one in found.until.sites:
        assert one.site in section
        assert f"{one.lead:+.3g} ± {one.half:.2g}" in section
    assert "averages are over different pairs" in page
    full.save(tmp_path / "all")
    plain = write_report(tmp_path / "all").read_text()
    assert 'id="settled"' not in plain
    assert "averages are over different pairs" not in plain


def test_equal_pairs_need_no_caution(full, plan, tmp_path):
    """A sweep whose folder has every row afterwards."""
    sweep = AdaptiveSweep(plan, UNTIL, known=full.rows)
    sweep.wanted()
    both = Result(full.rows, until=sweep.record)
    assert sweep.record.words in repr(both)
    assert "different pairs" not in repr(both)


def test_progress(tracer):
    told = []
    found = tracer.trace(
        PROBES, **ASKED, until=UNTIL, on_progress=lambda done, most: told.append((done, most))
    )
    assert told == [(i, 480) for i in range(1, len(found) + 1)]


# ---- refusals


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ("give until as well", {"budget": 100}),
        ("1 or more, not 0", {"until": UNTIL, "budget": 0}),
        ("1 or more, not True", {"until": UNTIL, "budget": True}),
        ("1 or more, not 2.5", {"until": UNTIL, "budget": 2.5}),
        ("21 runs is less than one pair takes: 22", {"until": UNTIL, "budget": 21}),
        ("can't be read", {"until": "the best"}),
        ("no choice", {"until": "top20"}),
        ("one window", {"until": UNTIL, "window": [(0, 1), (1, 2)]}),
        ("one source", {"until": UNTIL, "source": ["clean", "zero"]}),
        ("Unknown argument", {"untill": UNTIL}),
    ],
)
def test_bad_input(tracer, words, asked):
    with pytest.raises(UsageError, match=words):
        tracer.trace(PROBES, **ASKED, **asked)


def test_the_old_name_is_gone(tracer):
    with pytest.raises(UsageError, match="budget"):
        Tracer(tracer.model.pipe, budget=1 << 30)


def test_a_goal_as_a_record(plan):
    assert AdaptiveSweep(plan, Goal(10, True)).goal.text == UNTIL
    assert isinstance(AdaptiveSweep(plan, Goal(3, False, 0.9)).record, SettledRecord)
