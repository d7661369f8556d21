"""Scores of pictures go through the decoder; what has no gradient is refused in a sentence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fasttrace import Metric, Probe, Source, Tracer
from fasttrace.attribution.target import target_of
from fasttrace.errors import ModelError, UsageError
from fasttrace.metrics.attribute import AttributeScorer
from fasttrace.metrics.clip import ClipScorer
from fasttrace.testing import tiny_pipeline

PROBE = Probe("a photo of a red dog", "dog", "object")


@pytest.fixture(scope="module")
def tracer():
    return Tracer(tiny_pipeline("sd").to(torch.float64))


@pytest.fixture(scope="module")
def clip(folders):
    scorer = ClipScorer(folders["clip"], torch.device("cpu"))
    scorer.model.double()
    scorer.mean, scorer.std = scorer.mean.double(), scorer.std.double()
    return Metric("clip_score", "CLIP score", scorer.clip_score)


class Shapes(nn.Module):
    """Logits of two objects, smooth in the picture."""

    classes = {"object": ["cat", "dog"]}  # noqa: RUF012

    def forward(self, pictures):
        weights = torch.linspace(-1, 1, pictures[0].numel(), dtype=pictures.dtype) / 10
        x = pictures.flatten(1)
        return {"object": torch.stack([x @ weights, (x.square() @ weights) * 3], 1)}

    def probabilities(self, pictures):
        return {a: logits.softmax(1) for a, logits in self(pictures).items()}


def logits(pictures, _context):
    return Shapes()(pictures)["object"][:, 1]


def metrics(clip):
    scorer = AttributeScorer(Shapes(), None)
    return {
        "clip score": clip,
        "probability": Metric("attribute", "probability", scorer.score),
        "logit": Metric("logit", "logit of the dog", logits),
        "distance": Metric(
            "far", "far", lambda p, _: p.square().mean((1, 2, 3)), higher_is_closer=False
        ),
    }


@pytest.mark.parametrize("name", ["clip score", "probability", "logit", "distance"])
def test_gradients_in_latents_through_the_decoder(tracer, clip, name, wide):
    """Finite differences of decoder and metric together, in a random direction."""
    metric = metrics(clip)[name]
    generator = torch.Generator().manual_seed(1)
    clean, corrupt, way = (
        torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    model = tracer.model

    def score(latents):
        with torch.no_grad():
            return float(target_of(model, metric, PROBE, clean, latents, latents).base_scores[0])

    found = target_of(model, metric, PROBE, clean, corrupt, torch.cat([corrupt, clean]))
    turn = 1 if metric.higher_is_closer else -1
    assert found.base_scores.tolist() == pytest.approx([turn * found.corrupt, turn * found.clean])
    step = 1e-5
    for base, gradient in zip((corrupt, clean), found.gradient, strict=True):
        slope = (score(base + step * way) - score(base - step * way)) / (2 * step)
        assert abs(slope) > 1e-7
        assert float((gradient * way[0]).sum()) == pytest.approx(slope, rel=1e-5)


def test_screens_of_pictures(tracer, clip):
    """The whole way, against the slope of the exact patch in the CLIP score."""
    site = tracer.sites(sites="attn2")[-1]
    asked = {"steps": 2, "metric": clip}
    screen = tracer.screen(PROBE, sites=[site.name], **asked)
    [[found]] = screen.effects(site.name)
    [row] = tracer.trace([PROBE], sites=[site.name], pictures=False, **asked).rows
    assert screen.pairs[0].corrupt_score == pytest.approx(row.corrupt_score)
    assert screen.pairs[0].clean_score == pytest.approx(row.clean_score)
    assert screen.pairs[0].total_effect == pytest.approx(row.total_effect)
    many = tracer.screen(PROBE, sites=[site.name], estimator="integrated:6", **asked)
    assert many.effects(site.name)[0, 0] == pytest.approx(row.effect, rel=1e-3)
    assert found == pytest.approx(row.effect, rel=0.5)  # first order: no more is promised


def test_metrics_without_a_gradient_are_refused(tracer):
    refused = {
        "its score doesn't carry a gradient": lambda p: p.detach().mean((1, 2, 3)),
        "carries no gradient": lambda p: [0.5] * len(p),
        "requires grad": lambda p: torch.from_numpy(p.numpy()).mean((1, 2, 3)),
        "doesn't depend on what it is given": lambda p: torch.ones(len(p), requires_grad=True) * 2,
    }
    for words, function in refused.items():
        with pytest.raises(UsageError) as error:
            tracer.screen(PROBE, steps=1, metric=function)
        assert words in str(error.value)
        assert "latent_recovery" in str(error.value)  # and what to do


def test_scores_that_are_no_numbers_are_refused(tracer):
    with pytest.raises(ModelError, match="gave 1 scores for 2 pictures"):
        tracer.screen(PROBE, steps=1, metric=lambda p: p.mean()[None])
    with pytest.raises(ModelError, match="nan"):
        tracer.screen(PROBE, steps=1, metric=lambda p: p.mean((1, 2, 3)) * float("nan"))
    with pytest.raises(ModelError, match="no finite gradient"):
        tracer.screen(PROBE, steps=1, metric=lambda p: (p * 0).mean((1, 2, 3)).sqrt())


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ("one metric, not 2", {"metric": ["latent_recovery", "latent_distance"]}),
        ("Unknown level|Unknown .*brick", {"by": "brick"}),
        ("Unknown estimator", {"estimator": "magic"}),
        ("Unknown estimator", {"estimator": "averaged:x"}),
        ("1 to 64 points", {"estimator": "averaged:0"}),
        ("Unknown rule", {"estimator": "averaged:3:odd"}),
        ("horizon", {"horizon": 0}),
        ("horizon", {"horizon": 1.5}),
        ("horizon", {"horizon": True}),
        ("by names levels", {"by": 3}),
        ("by names levels", {"by": []}),
        ("Unknown estimator None", {"estimator": None}),
        ("Unknown estimator", {"estimator": "integrated:1.5"}),
        ("strength is above 0", {"estimator": "nudged:0"}),
        ("strength is above 0", {"estimator": "nudged:nan"}),
        ("in one window, not in 2", {"estimator": "joint", "steps": 2, "window": [(0, 1), (1, 2)]}),
        ("other sources, strengths and bases", {"source": "zero"}),
        ("other sources, strengths and bases", {"source": ["clean", "mean"]}),
        ("other sources, strengths and bases", {"source": Source("clean", strength=0.5)}),
        ("other sources, strengths and bases", {"source": "zero", "base": "clean"}),
        ("lanes", {"lanes": 0}),
        ("has scores by head", {"by": "head", "sites": "ff"}),
        ("says\\s+nothing of texts", {"by": "text", "estimator": "integrated:2"}),
        ("screen cond", {"by": "text", "branch": "uncond"}),
        ("screened by token", {"component": "text_encoder", "by": "head"}),
    ],
)
def test_wrong_calls_are_refused_in_a_sentence(tracer, words, asked):
    with pytest.raises(UsageError, match=words) as error:
        tracer.screen(PROBE, **{"steps": 1, "metric": "latent_recovery", **asked})
    assert str(error.value).endswith(".")


def test_a_scheduler_that_is_no_sum_is_refused():
    pipe = tiny_pipeline("kandinsky22")  # a learned variance
    with pytest.raises(UsageError, match="weighted sum"):
        Tracer(pipe).screen(PROBE, steps=1, metric="latent_recovery")


def test_a_flat_metric_is_noted():
    """Nothing to restore: said, and out of the ranking, instead of zeros that look like effects."""
    tracer = Tracer(tiny_pipeline("sd"))
    flat = Metric("flat", "flat", lambda x, _: (x * 0).flatten(1).sum(1), needs="latent")
    screen = tracer.screen(PROBE, steps=1, metric=flat)
    assert "flat is flat at the corrupt run" in screen.pairs[0].note
    with pytest.raises(UsageError, match="None of these pairs has anything to restore"):
        screen.ranking()
    assert "Choose other prompts" in str(screen)


def test_pairs_with_nothing_to_restore_take_no_part(tracer):
    """A metric and its negative: pairs that count for one don't for the other."""

    def metric(sign: float) -> Metric:
        weights = torch.randn(256, generator=torch.Generator().manual_seed(0))
        score = lambda x, _: sign * (x.flatten(1) * weights).sum(1)  # noqa: E731
        return Metric(f"sum{sign}", "sum", score, needs="latent")

    screens = [tracer.screen(PROBE, seeds=6, steps=1, metric=metric(s)) for s in (1.0, -1.0)]
    for screen in screens:
        for pair in screen.pairs:
            assert bool(pair.note) == (pair.total_effect <= 0)
        counts = [not p.note for p in screen.pairs]
        assert 0 < sum(counts) < 6
        best = screen.ranking("site")[0]
        own = screen.effects(best.site)[counts].mean()
        total = np.mean([p.total_effect for p in screen.pairs if not p.note])
        assert (best.effect, best.share) == (pytest.approx(own), pytest.approx(own / total))
    with pytest.raises(UsageError, match="by 'head'; there is all"):
        screen.ranking("head")


def test_the_model_is_left_as_it_was(tracer):
    pipe = tracer.model.pipe
    before = {n: (p._version, p.requires_grad) for n, p in pipe.unet.named_parameters()}
    grown = [n for n, p in pipe.unet.named_parameters() if p.requires_grad]
    random = torch.random.get_rng_state()
    tracer.screen(PROBE, steps=1, metric="latent_recovery", estimator="averaged:2")
    with pytest.raises(UsageError):
        tracer.screen(PROBE, steps=1, metric=lambda p: p.detach().mean((1, 2, 3)))
    after = {n: (p._version, p.requires_grad) for n, p in pipe.unet.named_parameters()}
    assert after == before
    assert grown
    assert all(p.grad is None for p in pipe.unet.parameters())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())
