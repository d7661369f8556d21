"""Scores against finite differences of the exact patch: the reference engine at small strengths."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fasttrace import Metric, Probe, Tracer
from fasttrace.adapters.scope import scope
from fasttrace.engine.base import CLEAN, CORRUPT
from fasttrace.engine.reference import ReferenceEngine
from fasttrace.errors import UsageError
from fasttrace.testing import runs_of, tiny_pipeline
from fasttrace.testing.tiny import make_scheduler
from fasttrace.types import Lane, Patch, Selector

PROBE = Probe("a photo of a red dog", "dog", negative_prompt="a car")
STEP = 1e-4
EPS = torch.finfo(torch.float64).eps


def bent(latents: torch.Tensor, _context: Any) -> torch.Tensor:
    """A smooth score of latents, no sum of them, and in 64 bits."""
    flat = latents.flatten(1).double()
    weights = torch.linspace(-1, 1, flat.shape[1], dtype=torch.float64)
    return (flat * weights).sum(1) + 0.1 * flat.square().sum(1)


pytestmark = pytest.mark.usefixtures("wide")
METRIC = Metric("bent", "bent", bent, needs="latent")


def close(score: float) -> dict[str, float]:
    """Of a difference of a smooth function of this size: the step's square, and rounding over the
    step (of a sum of 256 squares, so of some ten units in the last place)."""
    return {"rtol": 2e-5, "atol": 10 * EPS * abs(score) / STEP}


class Exact:
    """Scores of patched runs of one pair."""

    def __init__(self, tracer: Tracer, **asked: Any) -> None:
        self.tracer = tracer
        self.plan = tracer.plan(PROBE, metric=METRIC, **asked)
        with scope(tracer.model.pipe):
            self.pair = tracer._pair(self.plan, PROBE, [self.plan.rows[0]])

    def scores(self, lanes: list[Lane]) -> list[float]:
        engine = ReferenceEngine(self.tracer.model)
        with scope(self.tracer.model.pipe):
            found = runs_of(engine, replace(self.pair, lanes=tuple(lanes)))
        return [float(bent(found[i], None)) for i in range(len(lanes))]

    def slope(self, site: Any, selector: Selector) -> float:
        lanes = [Lane((Patch(site, selector, strength=s),)) for s in (STEP, -STEP)]
        above, below = self.scores(lanes)
        return (above - below) / (2 * STEP)


def tracer_of(family: Any, scheduler: str | None = None) -> Tracer:
    pipe = tiny_pipeline(family)
    if scheduler is not None:
        pipe.scheduler = make_scheduler(scheduler, steps_offset=1)
    return Tracer(pipe.to(torch.float64))


def some_sites(tracer: Tracer) -> list[Any]:
    """The first, and the last but one, of each kind."""
    found = []
    sites = tracer.sites()
    for kind in dict.fromkeys(site.kind for site in sites):
        own = [site for site in sites if site.kind == kind]
        found += [own[0], own[-2]]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize(
    ("family", "scheduler", "asked"),
    [
        ("sd", None, {"steps": 3}),  # PNDM: four predictions are remembered
        ("sd21", None, {"steps": 2}),  # DDIM, velocities
        ("sd", "HeunDiscrete", {"steps": 2}),
        ("sd", "DPMSolverMultistep", {"steps": 3}),
        ("sd", "EulerAncestralDiscrete", {"steps": 2}),  # fresh noise in every call
        ("sdxl", None, {"steps": 2}),  # pooled text enters every ResNet
        ("sdxl-turbo", None, {"steps": 2, "guidance": 0.0}),
        ("kandinsky21", None, {"steps": 2}),
    ],
)
def test_slopes_of_the_exact_patch(family, scheduler, asked):
    tracer = tracer_of(family, scheduler)
    sites = some_sites(tracer)
    both = "guidance" not in asked
    branch = "both" if both else "cond"
    screen = tracer.screen(
        PROBE, sites=[s.name for s in sites], branch=branch, metric=METRIC, **asked
    )
    exact = Exact(tracer, **asked)
    assert screen.pairs[0].total_effect != 0
    calls = screen.calls
    for window in ((0, calls), (0, 1), (calls - 1, calls)):
        for name in ("cond", "uncond") if both else ("cond",):
            selector = Selector(branch=name, window=window)
            found = [float(screen.effects(s.name, window, name)[0, 0]) for s in sites]
            if window == (0, calls) and name == "cond":
                assert max(map(abs, found)) > 1e-3
            chosen = sites if window == (0, calls) else sites[::3]
            for site in chosen:
                slope = exact.slope(site, selector)
                own = float(screen.effects(site.name, window, name)[0, 0])
                torch.testing.assert_close(
                    own,
                    slope,
                    **close(screen.pairs[0].corrupt_score),
                    msg=f"{site.name} {window} {name} {own} {slope}",
                )


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_slopes_of_text_encoder_patches(family):
    tracer = tracer_of(family)
    asked = {"steps": 2, "component": "text_encoder"}
    screen = tracer.screen(PROBE, metric=METRIC, **asked)
    exact = Exact(tracer, **asked)
    largest = 0.0
    for row in exact.plan.rows[::5]:
        [patch] = row.lane.patches
        if row.status != "run":
            continue
        above, below = exact_text(exact, patch)
        slope = (above - below) / (2 * STEP)
        own = screen.effects(patch.site.name)[0]
        found = float(sum(own[t] for t in patch.selector.tokens))
        torch.testing.assert_close(
            found,
            slope,
            **close(screen.pairs[0].corrupt_score),
            msg=f"{patch.site.name} {patch.selector}",
        )
        largest = max(largest, abs(found))
    assert largest > 1e-4
    zero = [row for row in exact.plan.rows if row.status != "run"]
    assert zero
    for row in zero:
        [patch] = row.lane.patches
        own = screen.effects(patch.site.name)[0]
        assert all(own[t] == 0 for t in patch.selector.tokens)


def exact_text(exact: Exact, patch: Patch) -> list[float]:
    lanes = [Lane((replace(patch, strength=s),)) for s in (STEP, -STEP)]
    return exact.scores(lanes)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_parts_sum_to_the_whole(family):
    """Channels and places of an output sum to the site; keys, values and heads have slopes too."""
    tracer = tracer_of(family)
    screen = tracer.screen(
        PROBE, steps=2, metric=METRIC, by=("site", "channel", "place", "head", "token", "neuron")
    )
    for reading in screen.readings:
        if reading.part == "output" and reading.axis != "all":
            whole = screen.effects(f"{reading.site}|output|all")
            parts = screen.effects(reading)
            assert parts.shape[1] == reading.size > 1
            torch.testing.assert_close(parts.sum(1), whole[:, 0], rtol=1e-9, atol=1e-12)
    axes = {(r.part, r.axis) for r in screen.readings}
    assert {("heads", "head"), ("key", "token"), ("value", "token"), ("hidden", "neuron")} <= axes


def test_the_text_is_a_full_cut():
    """Along the line between two texts the integral of the gradient is the difference."""
    for family, points in (("sd", 12), ("sdxl", 16)):
        tracer = tracer_of(family)
        screen = tracer.screen(
            PROBE, steps=2, metric=METRIC, by="text", estimator=f"averaged:{points}:gauss"
        )
        [(found, expected)] = screen.completeness()
        assert abs(expected) > 1e-3
        assert found == pytest.approx(expected, rel=1e-3)


def test_a_joint_cut_adds_up():
    """SD reads its text in cross-attentions alone: patched together they give the clean run."""
    tracer = tracer_of("sd")
    screen = tracer.screen(PROBE, steps=2, metric=METRIC, sites="attn2", estimator="joint:12")
    [(found, expected)] = screen.completeness()
    assert found == pytest.approx(expected, rel=1e-3)
    plain = tracer.screen(PROBE, steps=2, metric=METRIC, sites="attn2")
    assert abs(plain.completeness()[0][0] - expected) > 10 * abs(found - expected)


def test_integrated_strength_is_the_exact_effect():
    tracer = tracer_of("sd")
    sites = some_sites(tracer)[:5]
    screen = tracer.screen(
        PROBE, steps=2, metric=METRIC, sites=[s.name for s in sites], estimator="integrated:8"
    )
    exact = Exact(tracer, steps=2)
    base = screen.pairs[0].corrupt_score
    scores = exact.scores([Lane((Patch(site),)) for site in sites])
    for site, score in zip(sites, scores, strict=True):
        found = float(screen.effects(site.name)[0, 0])
        assert found == pytest.approx(score - base, rel=1e-4, abs=1e-7), site.name


def test_integrated_strength_in_a_window():
    """Patches act in the window alone, and other windows are not answered for."""
    window = 1, 3
    tracer = tracer_of("sd")
    sites = some_sites(tracer)[::2]
    screen = tracer.screen(
        PROBE,
        steps=2,
        metric=METRIC,
        sites=[s.name for s in sites],
        estimator="integrated:8",
        window=window,
    )
    exact = Exact(tracer, steps=2)
    selector = Selector(window=window)
    scores = exact.scores([Lane((Patch(site, selector),)) for site in sites])
    whole = exact.scores([Lane((Patch(site),)) for site in sites])
    differs = False
    for site, score, other in zip(sites, scores, whole, strict=True):
        effect = score - screen.pairs[0].corrupt_score
        differs |= abs(score - other) > 1e-4 * abs(effect)
        found = float(screen.effects(site.name)[0, 0])
        assert found == float(screen.effects(site.name, window)[0, 0])
        assert found == pytest.approx(effect, rel=1e-4, abs=1e-7), site.name
    assert differs, "the window must matter"
    for other in ((0, 3), (1, 2)):
        with pytest.raises(UsageError, match="says nothing of other windows"):
            screen.effects(sites[0].name, other)


@pytest.mark.parametrize("family", ["sd", "sd21", "sdxl"])
def test_nudged_slopes(family):
    """Half the slope at the corrupt run, half that where all that adds is patched a little."""
    tracer = tracer_of(family)
    added = [site for site in tracer.sites() if site.kind in ("attn1", "attn2", "ff")]
    sites = some_sites(tracer)[::3]
    screen = tracer.screen(
        PROBE, steps=2, metric=METRIC, sites=[s.name for s in sites], estimator="nudged:0.3"
    )
    exact = Exact(tracer, steps=2)

    def at(site: Any, step: float) -> Lane:
        rest = tuple(Patch(other, strength=0.3) for other in added if other != site)
        return Lane((*rest, Patch(site, strength=step + 0.3 * (site in added))))

    for site in sites:
        above, below = exact.scores([at(site, s) for s in (STEP, -STEP)])
        nudged = (above - below) / (2 * STEP)
        plain = exact.slope(site, Selector())
        assert abs(nudged - plain) > 1e-4 * abs(plain)
        found = float(screen.effects(site.name)[0, 0])
        torch.testing.assert_close(
            found, (nudged + plain) / 2, **close(screen.pairs[0].corrupt_score), msg=site.name
        )


def test_a_nudge_is_of_the_whole_model():
    """A site's score doesn't hang on which others are asked for."""
    tracer = tracer_of("sd")
    asked = {"steps": 2, "metric": METRIC, "estimator": "nudged"}
    every = tracer.screen(PROBE, **asked)
    site = tracer.sites()[5]
    alone = tracer.screen(PROBE, sites=site.name, by=("site", "channel"), **asked)
    assert alone.effects(site.name)[0, 0] == pytest.approx(every.effects(site.name)[0, 0])


def test_a_horizon_holds_later_predictions():
    """Exact runs in which the calls after the horizon give the corrupt run's own predictions."""
    tracer = tracer_of("sd", "DDIM")
    calls = 4
    site = tracer.sites(sites="attn2")[-1]
    exact = Exact(tracer, steps=calls)
    slopes: dict[int, list[float]] = {h: [] for h in (1, 2, 4)}
    for horizon, found in slopes.items():
        for call in range(calls):
            lanes = [_held(exact, site, call, horizon, s) for s in (STEP, -STEP)]
            found.append((lanes[0] - lanes[1]) / (2 * STEP))
        screen = tracer.screen(
            PROBE, steps=calls, metric=METRIC, sites=[site.name], horizon=horizon
        )
        own = [float(screen.effects(site.name, (c, c + 1))[0, 0]) for c in range(calls)]
        torch.testing.assert_close(own, found, **close(screen.pairs[0].corrupt_score))
    full = tracer.screen(PROBE, steps=calls, metric=METRIC, sites=[site.name])
    own = [float(full.effects(site.name, (c, c + 1))[0, 0]) for c in range(calls)]
    torch.testing.assert_close(own, slopes[4], **close(full.pairs[0].corrupt_score))
    assert slopes[1][0] != pytest.approx(slopes[4][0], rel=1e-2)


def _held(exact: Exact, site: Any, call: int, horizon: int, strength: float) -> float:
    """A loop of our own: the corrupt run patched at one call, predictions held behind it."""
    model, pair = exact.tracer.model, exact.pair
    sampling = pair.sampling
    module = model.unet_modules()[site.name]
    with scope(model.pipe), torch.no_grad():
        clean, corrupt = (_predictions(exact, run, module, None) for run in (CLEAN, CORRUPT))
        scheduler = model.scheduler(sampling.steps)
        latents = pair.start.latents * scheduler.init_noise_sigma
        inputs = model.conditioning(pair.texts[CORRUPT], sampling)
        for i, t in enumerate(scheduler.timesteps):
            prediction = corrupt[0][i]
            if call <= i < call + horizon:

                def write(_module: Any, _args: Any, out: Any, i: int = i) -> Any:
                    new = out.clone()
                    new[1:] = torch.lerp(out[1:], clean[1][i][1:], strength)
                    return new

                handle = module.register_forward_hook(write) if i == call else None
                batch = scheduler.scale_model_input(torch.cat([latents] * 2), t)
                prediction = model.guide(model.unet(batch, t, **inputs)[0], sampling)
                if handle is not None:
                    handle.remove()
            latents = scheduler.step(prediction, t, latents, return_dict=False)[0]
    return float(bent(latents, None))


def _predictions(exact: Exact, run: str, module: Any, _: None) -> tuple[list[Any], list[Any]]:
    model, pair = exact.tracer.model, exact.pair
    scheduler = model.scheduler(pair.sampling.steps)
    latents = pair.start.latents * scheduler.init_noise_sigma
    inputs = model.conditioning(pair.texts[run], pair.sampling)
    predictions, outputs = [], []
    handle = module.register_forward_hook(lambda _m, _a, out: outputs.append(out.clone()))
    for t in scheduler.timesteps:
        batch = scheduler.scale_model_input(torch.cat([latents] * 2), t)
        predictions.append(model.guide(model.unet(batch, t, **inputs)[0], pair.sampling))
        latents = scheduler.step(predictions[-1], t, latents, return_dict=False)[0]
    handle.remove()
    return predictions, outputs
