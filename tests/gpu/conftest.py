"""Everything here needs a CUDA device and is skipped, with the reason, where there is none.

`make test-gpu` runs it. float32 products keep their bits: without TF32.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
# What the tests of the engine share with those here; a folder of tests is no package.
_spec = importlib.util.spec_from_file_location(
    "fasttrace_fast_engine", HERE.parent / "engine" / "test_fast_engine.py"
)
assert _spec is not None
assert _spec.loader is not None
sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[_spec.name])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why = ""
    if not torch.cuda.is_available():
        why = "there is no CUDA device"
    elif os.environ.get("TRITON_INTERPRET") == "1":
        why = (
            "Triton would interpret its kernels: run `make test-gpu`, which sets TRITON_INTERPRET=0"
        )
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if why:
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")
