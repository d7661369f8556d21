"""Screens of a denoiser solved by hand.

h = 2 x + 3 text, prediction (h + h + 2 x) = 6 x + 6 text, x <- x - prediction = -5 x - 6 text, from
x = 1; clean text 1, corrupt text 0. In two calls corrupt x: 1, -5, 25; clean x: 1, -11, 49. With
M = the last x and a = 2 x (stream, ff and skip: dp/da = 3), b = 3 text (dp/db = 2), c = a + b (the
ff's output, dp/dc = 1), and dM/dp = 5 in the first of two calls, -1 in the last:

a: clean - corrupt is 0, then 2 (-11 + 5) = -12, so 0 and (-12)(-3) = 36
b: 3 and 3, so 3 (2)(5) = 30 and 3 (2)(-1) = -6
c: 3 and -22 + 3 + 10 = -9, so 3 (5) = 15 and (-9)(-1) = 9
"""

from __future__ import annotations

import pytest
import torch

from fasttrace.adapters.pipeline import Start
from fasttrace.adapters.text import Text
from fasttrace.attribution.backward import Backward
from fasttrace.attribution.estimators import Integrated, Plain
from fasttrace.attribution.forward import run_forward, schedule_of
from fasttrace.attribution.layout import Layout
from fasttrace.attribution.machine import Machine
from fasttrace.attribution.readings import readings_of
from fasttrace.attribution.scores import Question
from fasttrace.engine.base import CLEAN, CORRUPT, Pair
from fasttrace.engine.compiled import compile_denoiser
from fasttrace.engine.reference import ReferenceEngine
from fasttrace.testing import ToyModel, runs_of
from fasttrace.types import Lane, Patch, Sampling, Selector, Site

RESNET = Site("unet.down_blocks.0.resnets.0", "resnet", "unet", 0, (1, 1, 1))
ATTENTION = Site("unet.down_blocks.0.attentions.0.attn2", "attn2", "unet", 1, (1, 1, 1))
FEED = Site("unet.up_blocks.0.attentions.0.ff", "ff", "unet", 2, (1, 1, 1))
SITES = (RESNET, ATTENTION, FEED)


class DoubleToy(ToyModel):
    """In 64 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.dtype = torch.float64


def one(value: float) -> torch.Tensor:
    return torch.full((1, 1, 1), value, dtype=torch.float64)


def pair_of(steps: int, guidance: float, *lanes: Lane) -> Pair:
    uncond = one(-1.0) if guidance > 1 else None
    texts = {CLEAN: Text(one(1.0), uncond=uncond), CORRUPT: Text(one(0.0), uncond=uncond)}
    start = Start(torch.ones(1, 1, 1, 1, dtype=torch.float64), None)
    return Pair(texts, CORRUPT, start, Sampling(steps, guidance, 1, 1), lanes)


def screen(steps, guidance=1.0, branches=("cond",), horizon=None, estimator=None, gradient=1.0):
    """Scores [branches, calls] by site, of the metric `gradient` times the last x."""
    model, pair = DoubleToy(), pair_of(steps, guidance)
    estimator = estimator or Plain()

    def inputs(rows):
        return {
            "sample": torch.zeros(rows, 1, 1, 1, dtype=torch.float64),
            "timestep": torch.zeros(rows, dtype=torch.int64),
            "encoder_hidden_states": torch.zeros(rows, 1, 1, dtype=torch.float64),
        }

    denoiser = compile_denoiser(model.unet, inputs)
    schedule = schedule_of(model, pair.sampling, pair)
    guided = model.guided(pair.sampling)
    machine = Machine(
        denoiser, schedule, model.dtype, model.device, guided=guided, guidance=guidance
    )
    readings = readings_of(denoiser.marks, SITES, "site")
    question = Question(readings, estimator, branches, horizon)
    layout = Layout(model, pair.sampling, [pair], estimator.bases(question.marks, ()))
    machine.set_texts(layout.given)
    patched = tuple(dict.fromkeys(mark for base in layout.bases for mark in base.patched))
    step = machine.step(len(layout.lanes), patched)
    latents = run_forward(model, pair.sampling, schedule, layout, step, branches)
    start = torch.full((len(layout.rows), 1, 1, 1), gradient, dtype=torch.float64)
    found = Backward(machine, layout, question, latents, start).run()
    return {r.site: found.scores[r.key][0, :, :, 0] for r in readings}


def exact(steps, guidance, *lanes):
    """The last x of patched runs, and of the corrupt one."""
    runs = runs_of(ReferenceEngine(DoubleToy()), pair_of(steps, guidance, *lanes))
    return [float(runs[i]) for i in range(len(lanes))], float(runs[CORRUPT])


def test_worked_out_on_paper():
    found = screen(2)
    assert found[RESNET.name].tolist() == [[0.0, 36.0]]
    assert found[ATTENTION.name].tolist() == [[30.0, -6.0]]
    assert found[FEED.name].tolist() == [[15.0, 9.0]]


def test_all_calls_are_first_order():
    """The exact patch of the ResNet in both calls gives 61 - 25, of the attention 49 - 25: its
    sum, 24. The ff's exact 43 - 25 = 18 overrides the path through the second call's ff, which the
    sum of 24 still counts."""
    found = {site: float(scores.sum()) for site, scores in screen(2).items()}
    assert found == {RESNET.name: 36.0, ATTENTION.name: 24.0, FEED.name: 24.0}
    lanes = [Lane((Patch(site),)) for site in SITES]
    scores, corrupt = exact(2, 1.0, *lanes)
    assert [score - corrupt for score in scores] == [36.0, 24.0, 18.0]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_one_call_is_the_exact_patch(guidance, branch):
    if guidance == 1.0 and branch == "uncond":
        branch = "cond"
    steps = 4
    found = screen(steps, guidance, (branch,))
    windows = [(call, call + 1) for call in range(steps)]
    for site in SITES:
        lanes = [Lane((Patch(site, Selector(branch=branch, window=w)),)) for w in windows]
        scores, corrupt = exact(steps, guidance, *lanes)
        expected = torch.tensor([score - corrupt for score in scores], dtype=torch.float64)
        of_text = branch == "uncond" and site is ATTENTION  # one text in all unconditional rows
        assert bool(expected.any()) != of_text
        torch.testing.assert_close(found[site.name][0], expected, rtol=1e-10, atol=1e-10)


def test_branches_are_apart():
    both = screen(3, 2.0, ("cond", "uncond"))
    for i, branch in enumerate(("cond", "uncond")):
        alone = screen(3, 2.0, (branch,))
        for site in SITES:
            assert torch.equal(both[site.name][i], alone[site.name][0])


@pytest.mark.parametrize("horizon", [1, 2, 3, 9])
def test_horizons_on_paper(horizon):
    """Held, a later call hands x on (factor 1) where it would answer (factor -5)."""
    steps = 3
    found = screen(steps, horizon=horizon)[ATTENTION.name][0].tolist()
    slopes = [3 * 2 * -1.0 * (-5.0) ** min(steps - 1 - call, horizon - 1) for call in range(steps)]
    assert found == slopes


def test_integrated_over_the_ffs_own_strength():
    """Exact where the sum of slopes is not: 18, with one call's share depending on the other."""
    found = screen(2, estimator=Integrated(3))[FEED.name]
    assert float(found.sum()) == pytest.approx(18.0, abs=1e-10)


def test_the_gradient_is_linear_in_the_metric():
    assert torch.equal(screen(3, gradient=4.0)[FEED.name], 4 * screen(3)[FEED.name])
