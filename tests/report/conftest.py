from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

FAKES = Path(__file__).parents[1] / "store" / "fake_rows.py"


def load(name: str, path: Path) -> ModuleType:
    """A module that is no part of a package; each once."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


load("fasttrace_edit_pages", Path(__file__).parent / "edit_pages.py")  # tests import it


@pytest.fixture(scope="session")
def fakes() -> ModuleType:
    return load("fasttrace_fake_rows", FAKES)


@pytest.fixture(scope="session")
def rows(fakes):
    """A sweep over four attributes, three prompts each, UNet and text encoder."""
    return list(fakes.fake_sweep())


@pytest.fixture(scope="module")
def traced(rows):
    """Style and object, three prompts each; after the edit a tenth of the style is left."""
    before = [r for r in rows if r.attribute in ("style", "object")]
    after = [
        replace(r, effect=r.effect / 10, total_effect=r.total_effect / 10, noise_floor=3e-4)
        if r.attribute == "style"
        else r
        for r in before
    ]
    return before, after
