from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FAKES = Path(__file__).parents[1] / "store" / "fake_rows.py"


@pytest.fixture(scope="session")
def fakes() -> ModuleType:
    name = "fasttrace_fake_rows"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, FAKES)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def rows(fakes):
    """A sweep over four attributes, three prompts each, UNet and text encoder."""
    return list(fakes.fake_sweep())
