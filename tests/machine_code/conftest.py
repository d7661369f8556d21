"""The machine code that every kernel becomes, read once for all tests of this folder."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:  # bench/ is no package that is installed
    sys.path.append(str(ROOT))


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `bench.machine_code.measure` returns, for everything; minutes.

    In a process of its own: under pytest Triton's functions are made for its interpreter.
    """
    path = tmp_path_factory.mktemp("machine_code") / "found.json"
    subprocess.run(
        [sys.executable, "-m", "bench.machine_code", "--json", path],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        stdout=subprocess.DEVNULL,
        check=True,
        timeout=1500,
    )
    return json.loads(path.read_text())
