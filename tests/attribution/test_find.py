"""What `find` checks, what it says of the rest, and that its exact numbers are those of a trace."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from fasttrace import Probe, Tracer
from fasttrace.attribution.audit import most_above
from fasttrace.attribution.find import Asked, Scores, cells_of, choose, find, plan_groups
from fasttrace.attribution.found import FOUND, load_found
from fasttrace.attribution.runner import Runner
from fasttrace.errors import StoreError, UsageError
from fasttrace.report.names import WHOLE_STREAM

PROBES = [Probe("a photo of a red dog", "dog"), Probe("a big house", "house")]
ASKED = {"seeds": [0, 1], "steps": 2, "metric": "latent_recovery"}


@pytest.fixture(scope="module")
def tracer(sd):
    return Tracer(sd)


@pytest.fixture(scope="module")
def plan(tracer):
    return tracer.plan(PROBES, **ASKED)


@pytest.fixture(scope="module")
def exact(tracer, plan):
    return {row.key: row for row, _ in tracer.iter_rows(plan, pictures=False)}


@pytest.fixture(scope="module")
def found(tracer):
    return tracer.find(PROBES, top=5, audit=4, groups=3, inside=2, draw=7, **ASKED)


@pytest.fixture(scope="module")
def joined(tracer):
    """With a threshold that more winners reach."""
    return tracer.find(PROBES, top=5, audit=4, groups=3, inside=0, threshold=-9.0, **ASKED)


def test_exact_rows_are_those_of_a_trace(found, exact):
    checked = {(p.site, p.selector) for p in found.places if p.exact is not None}
    assert len(found.rows) == len(checked) * 4
    for row in found.rows:
        assert (row.site, row.selector) in checked
        assert row.score == pytest.approx(exact[row.key].score, abs=2e-6)


def test_who_is_checked(found, tracer, plan):
    by = {why: [p for p in found.places if p.why == why] for why in ("always", "top", "audit", "")}
    assert {p.kind for p in by["always"]} == {"resnet"}
    assert not [p for p in found.places if p.kind in WHOLE_STREAM and p.why != "always"]
    assert (len(by["top"]), len(by["audit"])) == (5, 4)
    assert min(p.screened for p in by["top"]) >= max(p.screened for p in by["audit"] + by[""])
    again = tracer.find(PROBES, top=5, audit=4, groups=0, draw=7, **ASKED)
    assert [p.why for p in again.places] == [p.why for p in found.places]
    other = tracer.find(PROBES, top=5, audit=4, groups=0, draw=8, **ASKED)
    assert [p.why for p in other.places] != [p.why for p in found.places]
    assert {p.why for p in other.places if p.why != "audit"} == {"always", "top", ""}


def test_numbers_by_hand(found, exact):
    counted = {}
    for row in found.rows:
        counted.setdefault((row.site, row.selector), {}).setdefault(row.prompt, []).append(
            row.effect
        )
    assert found.counted == found.pairs == 4
    for place in found.places:
        if place.exact is not None:
            prompts = counted[place.site, place.selector].values()
            assert place.exact == pytest.approx(np.mean([np.mean(own) for own in prompts]))
    screen = found.screen
    for place in found.places:
        assert place.screened == pytest.approx(screen.effects(place.site).mean())
    tenth = max(1, round(0.1 * len(found.places)))
    verified = sorted((p.exact for p in found.places if p.why in ("always", "top")), reverse=True)
    assert found.threshold == verified[tenth - 1]
    population = sum(p.why in ("audit", "") for p in found.places)
    above = sum(p.why == "audit" and p.exact > found.threshold for p in found.places)
    bound = most_above(population, 4, above)
    assert (found.audit.population, found.audit.sample) == (population, 4)
    assert (found.audit.above, found.audit.bound) == (above, bound)
    selected = sum(p.why in ("always", "top") for p in found.winners)
    assert found.least_recall == selected / (selected + bound)
    assert found.cost.screen == pytest.approx(screen.generations * 4)
    assert found.cost.exact == len(found.rows) + 2 * 4
    assert found.cost.exhaustive == len(found.places) * 4 + 2 * 4
    assert found.total_effect == pytest.approx(1)  # recovery is 1 at the clean run


def test_together(joined, plan, sd):
    found = joined
    assert len(found.together) == 4  # three pairs and all three
    cells = cells_of(plan)
    reference = Tracer(sd, engine="reference")
    own = reference.plan(PROBES, **ASKED)
    groups = [[cells[key] for key in one.places] for one in found.together]
    joint = plan_groups(own, [[cells_of(own)[cell.key] for cell in group] for group in groups])
    rows = {row.key: row for row, _ in reference.iter_rows(joint, pictures=False)}
    for number, one in enumerate(found.together):
        effects = [rows[p.key].effect for p in joint.rows[number :: len(groups)]]
        assert one.together == pytest.approx(np.mean(effects), abs=2e-5)
        assert one.gain == pytest.approx(one.together - max(one.alone))
        assert one.overlap == pytest.approx(sum(one.alone) - one.together)
    assert found.cost.together == 4 * 4 + 2 * 4


def test_inside(found):
    assert {p.axis for p in found.finer} >= {"channel"}
    best = {p.site for p in found.winners[:3]}
    assert {p.site for p in found.finer} == best
    for part in found.finer:
        reading = next(
            r for r in found.screen.readings if (r.site, r.axis) == (part.site, part.axis)
        )
        means = found.screen.effects(reading).mean(0)
        assert part.screened == pytest.approx(means[list(part.coordinates)].sum())
        if len(part.coordinates) == 1:
            assert (means > means[part.coordinates[0]]).sum() < 2
    assert found.cost.inside > 0


def test_inside_in_a_window(tracer):
    """All of a site's channels are the site, in the window that was asked for."""
    site = next(s for s in tracer.sites() if s.kind == "attn2")
    asked = {**ASKED, "window": (0, 1), "always": "attn2"}
    found = tracer.find(PROBES, threshold=-9.0, groups=9, inside=10_000, audit=0, **asked)
    [place] = [p for p in found.places if p.site == site.name]
    parts = [p for p in found.finer if (p.site, p.axis) == (site.name, "channel")]
    together = max(parts, key=lambda p: len(p.coordinates))
    assert len(together.coordinates) == site.shape[-1] == len(parts) - 1
    assert together.exact == pytest.approx(place.exact, rel=1e-3, abs=1e-6)
    [row] = [r for r in found.rows if (r.site, r.prompt, r.seed) == (site.name, "a big house", 0)]
    assert (row.window_start, row.window_stop) == (0, 1)


def test_a_screen_that_ranks_backwards_is_found_out(tracer, plan):
    """The worst places are verified; what is missed is in the rest, and the bound says so."""
    screen = tracer.screen(PROBES, **ASKED)
    turned = replace(screen, scores={key: -value for key, value in screen.scores.items()})
    runner, asked = Runner(tracer, plan), Asked(top=4, audit=100, groups=0, always=())
    good = find(plan, screen, runner, asked)
    bad = find(plan, turned, runner, replace(asked, threshold=good.threshold))
    effects = [p.exact for p in bad.places if p.why == "audit"]
    assert bad.audit.bound == bad.audit.above == sum(e > good.threshold for e in effects)
    assert bad.audit.bound > good.audit.bound
    assert bad.recall < good.recall
    rho = "ranked by the screen"
    assert bad.correlations[rho] == pytest.approx(-good.correlations[rho])


def test_choosing():
    class Site:
        def __init__(self, name, kind):
            self.name, self.kind = name, kind

    class Cell:
        def __init__(self, name, kind):
            self.site, self.selector, self.key = Site(name, kind), "all", (name, "all")

    cells = {c.key: c for c in [Cell(n, "resnet" if n == "r" else "ff") for n in "abcrdef"]}
    scores = {key: float(i) for i, key in enumerate(cells)}
    why = choose(cells, scores, Asked(top=2, audit=0))
    assert {key[0]: reason for key, reason in why.items()} == {
        "r": "always", "e": "top", "f": "top",
    }  # fmt: skip
    assert len(choose(cells, scores, Asked(audit=100))) == len(cells)
    assert [k[0] for k, w in choose(cells, scores, Asked()).items() if w == "top"] == ["e", "f"]


def test_text_encoder(tracer):
    """Places are layers and token groups; scores are summed over a group's tokens."""
    asked = {"component": "text_encoder", "steps": 2, "metric": "latent_recovery"}
    found = tracer.find(PROBES[0], top=4, audit=3, **asked)
    assert found.finer == ()
    plan = tracer.plan(PROBES[0], **asked)
    scores = Scores(plan, found.screen)
    cells = cells_of(plan)
    for place in found.places:
        row = next(iter(cells[place.key].rows.values()))
        tokens = row.lane.patches[0].selector.tokens
        effects = found.screen.effects(place.site)[0]
        expected = effects.sum() if tokens is None else effects[list(tokens)].sum()
        assert place.screened == pytest.approx(expected)
    assert scores.names == [(0, 0)]
    assert any(p.selector.startswith("last subject") for p in found.places)


def test_round_trip(found, tmp_path):
    page = found.save(tmp_path)
    again = load_found(tmp_path)
    assert again == found
    assert again.rows == found.rows
    assert str(again) == str(found)
    html = page.read_text(encoding="utf-8")
    assert html.count("<circle") == sum(p.exact is not None for p in found.places)
    assert html.count(' ring"') == 4
    assert "confidence the screen left out at most" in html
    assert all(p.name in html for p in found.winners)
    text = json.loads((tmp_path / FOUND).read_text(encoding="utf-8"))
    (tmp_path / FOUND).write_text(json.dumps(text | {"version": 9}), encoding="utf-8")
    with pytest.raises(StoreError, match="version 9"):
        load_found(tmp_path)
    (tmp_path / FOUND).write_text(json.dumps({"version": 1, "places": []}), encoding="utf-8")
    with pytest.raises(StoreError, match="nothing found"):
        load_found(tmp_path)
    with pytest.raises(StoreError):
        load_found(tmp_path / "nowhere")


def test_the_page_escapes(found, tmp_path):
    odd = replace(found, cut="<script>alert(1)</script>")
    html = odd.save(tmp_path).read_text(encoding="utf-8")
    assert "<script" not in html
    assert "&lt;script" in html


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ("top is a whole number of at least 1", {"top": 0}),
        ("audit is a whole number", {"audit": -1}),
        ("inside is a whole number", {"inside": True}),
        ("not a finite number", {"threshold": float("nan")}),
        ("not a finite number", {"threshold": "a"}),
        ("'attn7' is none; this plan has attn1", {"always": "attn7"}),
        ("seed of the draw", {"draw": 0.5}),
        ("one metric, not 2", {"metric": ["latent_recovery", "latent_distance"]}),
        ("one window of calls at a time", {"window": [(0, 1), (1, 2)]}),
        ("other sources, strengths and bases", {"source": "zero"}),
        ("nothing has to be found", {"sites": "unet.mid_block.resnets.0"}),
        ("nothing to restore|anything to restore", {"metric": "flat"}),
    ],
)
def test_bad_input(tracer, words, asked):
    from fasttrace import Metric

    given = {"steps": 2, "metric": "latent_recovery", **asked}
    if given["metric"] == "flat":
        flat = lambda latents, _context: latents.flatten(1).sum(1) * 0 + 1  # noqa: E731
        given["metric"] = Metric("flat", "flat", flat, needs="latent")
    with pytest.raises(UsageError, match=words):
        tracer.find(PROBES[0], **given)


def test_another_screen(tracer, plan):
    screen = tracer.screen(PROBES[:1], **ASKED)
    with pytest.raises(UsageError, match="other pairs"):
        Scores(plan, screen)
