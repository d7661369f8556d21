"""The reference engine on a denoiser solved by hand.

h = 2 x + 3 text, prediction 2 h + 2 x, x <- x - prediction, twice, from x = 1; clean text 1,
corrupt text 0, unconditional text -1. Worked out on paper, for guidance 1:

clean    x: 1 -> 1 - (5 + 5 + 2) = -11 -> -11 - (-19 - 19 - 22) = 49
corrupt  x: 1 -> 1 - (2 + 2 + 2) = -5 -> -5 - (-10 - 10 - 10) = 25
"""

import pytest
import torch

from fasttrace.adapters.pipeline import Start
from fasttrace.adapters.text import Text
from fasttrace.engine.base import CLEAN, CORRUPT, FLOOR, Pair
from fasttrace.engine.reference import ReferenceEngine
from fasttrace.testing import ToyModel, runs_of
from fasttrace.types import Lane, Patch, Sampling, Selector, Site

RESNET = Site("unet.down_blocks.0.resnets.0", "resnet", "unet", 0, (1, 1, 1))
ATTENTION = Site("unet.down_blocks.0.attentions.0.attn2", "attn2", "unet", 1, (1, 1, 1))
FEED = Site("unet.up_blocks.0.attentions.0.ff", "ff", "unet", 2, (1, 1, 1))


def one(value: float) -> torch.Tensor:
    return torch.full((1, 1, 1), value)


def final(*patches: Patch, guidance: float = 1.0, base: str = CORRUPT, run: str | int = 0) -> float:
    uncond = one(-1.0) if guidance > 1 else None
    texts = {CLEAN: Text(one(1.0), uncond=uncond), CORRUPT: Text(one(0.0), uncond=uncond)}
    start = Start(torch.ones(1, 1, 1, 1), None)
    pair = Pair(texts, base, start, Sampling(2, guidance, 1, 1), (Lane(patches),))
    return float(runs_of(ReferenceEngine(ToyModel()), pair)[run][0])


@pytest.mark.parametrize(("run", "expected"), [(CLEAN, 49), (CORRUPT, 25), (FLOOR, 25)])
def test_runs(run, expected):
    assert final(run=run) == expected


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        (RESNET, 61),  # second call: a = -22 in stream and skip, x = -5 + 66
        (ATTENTION, 49),  # text enters here alone: the clean run
        (FEED, 43),  # x = 1 - (2 + 5 + 2) = -8, then -8 - (-16 - 19 - 16)
    ],
)
def test_a_site_in_every_call(site, expected):
    assert final(Patch(site)) == expected


def test_window():
    """First call corrupt (x = -5), second with b = 3: h = -7, x = -5 + 7 + 7 + 10."""
    assert final(Patch(ATTENTION, Selector(window=(1, 2)))) == 19


def test_two_sites_in_one_lane():
    """b = 3 makes the run the clean one up to the ff, which is then the clean run's own."""
    assert final(Patch(ATTENTION), Patch(FEED)) == 49


@pytest.mark.parametrize(("run", "expected"), [(CLEAN, 97), (CORRUPT, 49)])
def test_guided_runs(run, expected):
    """Clean: 0 + 2 (12 - 0) = 24, x = -23; then -144 + 2 (-132 + 144) = -120, x = 97."""
    assert final(guidance=2.0, run=run) == expected


@pytest.mark.parametrize(
    ("branch", "strength", "expected"),
    [
        ("cond", 1.0, 193),  # second call: -72 + 2 (-138 + 72) = -204, x = -11 + 204
        ("uncond", 1.0, -23),  # -144 + 2 (-66 + 144) = 12, x = -11 - 12
        ("both", 1.0, 121),  # -144 + 2 (-138 + 144) = -132, x = -11 + 132
        ("cond", 0.5, 121),  # a = -34: -72 + 2 (-102 + 72) = -132
        ("cond", 0.0, 49),  # the corrupt run
    ],
)
def test_branch_and_strength(branch, strength, expected):
    patch = Patch(RESNET, Selector(branch=branch), strength=strength)
    assert final(patch, guidance=2.0) == expected


@pytest.mark.parametrize(
    ("base", "source", "expected"), [(CLEAN, CORRUPT, 25), (CORRUPT, CLEAN, 49)]
)
def test_swapped_text(base, source, expected):
    """One run's text in the only module that reads text is the other run."""
    assert final(Patch(ATTENTION, source=f"text:{source}"), base=base) == expected
