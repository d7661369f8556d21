"""Plans as files for the tests of `fasttrace run`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PLAN: dict[str, Any] = {
    "probes": [{"prompt": "a photo of a dog in the house", "subject": "dog"}],
    "seeds": [0, 1],
    "sites": ["attn2"],
    "steps": 3,
    "guidance": 3.0,
    "metrics": ["latent_recovery"],
}


@pytest.fixture
def write_plan(tmp_path: Path) -> Callable[..., Path]:
    def write(**change: Any) -> Path:
        file = tmp_path / "plan.json"
        file.write_text(json.dumps(PLAN | change), encoding="utf-8")
        return file

    return write
