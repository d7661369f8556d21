"""Only latents are kept; one call at a time is recomputed on the way back."""

from __future__ import annotations

import torch

from fasttrace import Tracer
from fasttrace.testing import tiny_pipeline
from fasttrace.testing.memory import PeakBytes

LATENT = 4 * 8 * 8 * 4  # bytes


def test_the_measure_sees_what_autograd_keeps():
    with PeakBytes() as alone:
        x = torch.zeros(1000)
        for _ in range(10):
            x = x.sin()
    assert 8000 <= alone.peak <= 12000
    with PeakBytes() as kept:
        x = torch.zeros(1000, requires_grad=True)
        y = x
        for _ in range(10):
            y = y.sin()
        torch.autograd.grad(y.sum(), x)
    assert kept.peak >= 44000
    del x, y
    assert kept.now == 0


def peak(steps: int, **asked) -> int:
    tracer = Tracer(tiny_pipeline("sd", scheduler="DDIM"))
    tracer.screen("a photo of a dog", "dog", steps=1, metric="latent_recovery", **asked)  # traces
    with PeakBytes() as measured:
        tracer.screen("a photo of a dog", "dog", steps=steps, metric="latent_recovery", **asked)
    return measured.peak


def test_memory_is_one_steps():
    """Twelve calls take what two take, but for latents and a row of each time embedding's table."""
    few, many = (peak(steps, by=("site", "head", "token", "channel")) for steps in (2, 12))
    latents = 10 * 2 * 2 * LATENT  # of two lanes, as they come, and stacked
    assert many - few < latents + 0.1 * few
    assert few > 20 * LATENT


def test_lanes_bound_the_memory():
    """More points cost more runs, not more memory, where lanes say so."""
    one = peak(2, lanes=1)
    several = peak(2, lanes=1, estimator="averaged:6")
    assert several < 1.5 * one
    wide = peak(2, lanes=6, estimator="averaged:6")
    assert wide > 2 * several
