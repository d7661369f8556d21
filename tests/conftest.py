"""Fixtures shared by all tests. Adding a model to `FAMILIES` runs every invariant on it."""

import os

# Set before anything imports triton: `triton.jit` reads it when a kernel is defined.
os.environ.setdefault("TRITON_INTERPRET", "1")

from pathlib import Path
from typing import Any

import pytest

from fasttrace.types import Probe

# What `pipeline` stands for in turn: tiny random models of both layouts.
FAMILIES = ("sd", "sdxl")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved pipelines by family, and "clip", a scoring model."""
    from fasttrace.testing import tiny_clip, tiny_pipeline

    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        tiny_pipeline(family, root / family)
    tiny_clip(root / "clip")
    return {name: root / name for name in (*FAMILIES, "clip")}


@pytest.fixture(scope="session", params=FAMILIES)
def pipeline(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Any:
    """A loaded pipeline. Shared: whoever changes it puts it back (see `fasttrace...scope`)."""
    import fasttrace

    return fasttrace.load(str(folders[request.param]))


@pytest.fixture(scope="session")
def sd(folders: dict[str, Path]) -> Any:
    """The single-encoder pipeline alone, for what doesn't depend on the family."""
    import fasttrace

    return fasttrace.load(str(folders["sd"]))


@pytest.fixture
def probe() -> Probe:
    return Probe("a photo of a dog in the house", "dog", "object")
