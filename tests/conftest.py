"""Fixtures shared by all tests. Adding a model to `MODELS` runs every invariant on it."""

import gc
import os

# Set before anything imports triton: `triton.jit` reads it when a kernel is defined.
os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from fasttrace.types import Probe

ROOT = Path(__file__).parents[1]
# How long an example takes says something of the machine, not of the code.
settings.register_profile("timeless", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("timeless")
# Tiny random models of both layouts, and with others and the bundled one what `pipeline` stands for
# in turn. Kandinsky's pipelines take other arguments: see test_families*.py.
FAMILIES = ("sd", "sdxl")
MODELS = (*FAMILIES, "sd21", "sdxl-turbo", "embedded")


def pytest_collection_finish() -> None:
    """What has been imported stays, and needs no looking through: that took a fifth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved pipelines by family, and "clip", a scoring model."""
    from fasttrace.testing import tiny_clip, tiny_pipeline
    from fasttrace.testing.tiny import FAMILIES as EVERY

    root = tmp_path_factory.mktemp("models")
    for family in EVERY:
        tiny_pipeline(family, root / family)
    tiny_clip(root / "clip")
    return {name: root / name for name in (*EVERY, "clip")}


@pytest.fixture(scope="session")
def loaded(folders: dict[str, Path]) -> Callable[[str], Any]:
    """Pipelines by name, each loaded once and shared: whoever changes one puts it back."""
    import fasttrace

    return cache(lambda name: fasttrace.load(str(folders.get(name, name))))


@pytest.fixture(scope="session", params=MODELS)
def pipeline(request: pytest.FixtureRequest, loaded: Callable[[str], Any]) -> Any:
    """Every model in turn: for the invariants."""
    return loaded(request.param)


@pytest.fixture(scope="session", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, loaded: Callable[[str], Any]) -> Any:
    """Both tiny models in turn: 24 tokens, 16 wide, 16x16 pictures."""
    return loaded(request.param)


@pytest.fixture(scope="session")
def sd(loaded: Callable[[str], Any]) -> Any:
    """The tiny model with one encoder alone, for what doesn't depend on the family."""
    return loaded("sd")


@pytest.fixture
def probe() -> Probe:
    return Probe("a photo of a dog in the house", "dog", "object")
