"""Screens and what `find` asks for on a real device, against the same on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fasttrace
from fasttrace.attribution.result import Screen
from fasttrace.report.uncertainty import rank_correlation

ASKED: dict[str, Any] = {"steps": 5, "metric": "latent_recovery"}
ESTIMATORS = ("plain", "plain+keys", "averaged:2", "joint:2")


def noise() -> torch.Generator:
    """The same first latent on either device: a pipeline's own generator is its device's."""
    return torch.Generator().manual_seed(0)


def screened(folder: str, device: str, dtype: str = "float32", **rest: Any) -> Screen:
    tracer = fasttrace.Tracer(fasttrace.load(folder, device=device, dtype=dtype))
    return tracer.screen("a photo of a red dog", "dog", generator=noise(), **ASKED, **rest)


def worst(one: Screen, other: Screen) -> float:
    """Largest difference of a score by the largest score along its axis."""
    assert one.scores.keys() == other.scores.keys()
    found = []
    for axis in {reading.axis for reading in other.readings}:
        keys = [reading.key for reading in other.readings if reading.axis == axis]
        gaps = [np.abs(one.scores[key] - other.scores[key]).max() for key in keys]
        found.append(max(gaps) / max(np.abs(other.scores[key]).max() for key in keys))
    return float(max(found))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("family", ["sd", "sdxl", "embedded"])
def test_a_screen_is_the_cpus(folders: dict[str, Path], family: str, estimator: str) -> None:
    folder = str(folders.get(family, family))
    by = ("site", "head", "token", "channel", "neuron")
    here, there = (
        screened(folder, device, estimator=estimator, by=by) for device in ("cuda", "cpu")
    )
    assert here.flops == there.flops
    assert worst(here, there) < 1e-3


def test_a_screen_of_a_text_encoder_is_the_cpus(folders: dict[str, Path]) -> None:
    here, there = (
        screened(str(folders["sd"]), device, component="text_encoder") for device in ("cuda", "cpu")
    )
    assert worst(here, there) < 1e-3


def test_a_screen_in_half_precision() -> None:
    half = screened("embedded", "cuda", "float16")
    single = screened("embedded", "cpu")
    one, other = ([float(s.effects(r)[0, 0]) for r in s.readings] for s in (half, single))
    assert rank_correlation(one, other) > 0.98


def test_what_find_checks_is_the_cpus() -> None:
    def effects(device: str) -> dict[Any, float]:
        tracer = fasttrace.Tracer(fasttrace.load("embedded", device=device))
        found = tracer.find(
            "a photo of a red dog", "dog", top=3, audit=3, generator=noise(), **ASKED
        )
        whole = {place.key: place.exact for place in found.places if place.exact is not None}
        return whole | {(f.site, f.axis, f.coordinates): f.exact for f in found.finer}

    here, there = effects("cuda"), effects("cpu")
    assert here.keys() == there.keys()
    assert max(abs(here[key] - there[key]) for key in here) < 1e-3
