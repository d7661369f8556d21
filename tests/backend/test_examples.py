"""The examples run as they stand, each in a process of its own, within a minute."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
WRITES = {
    "direction.py": ("direction.png", "activations/activations.json"),
    "embed.py": ("effects.png", "patched.png"),
    "sites.py": ("plan.json", "rows/results.parquet"),
}


def test_each_is_run():
    assert {path.name for path in EXAMPLES} == WRITES.keys()


@pytest.mark.parametrize("name", WRITES)
def test_runs(name, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", ROOT / "examples" / name, tmp_path / "out"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "agg"},
        timeout=240,  # alone it takes a quarter of a minute; other tests may run beside it
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for file in WRITES[name]:
        assert (tmp_path / "out" / file).stat().st_size > 100
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    if name == "direction.py":
        # The direction does what it is said to: the more of it, the less of the cat.
        lost = [float(value) for value in re.findall(r"lost +(-?[\d.]+)", done.stdout)]
        assert len(lost) == 4
        assert lost[-1] > max(50, lost[0])
    if name == "sites.py":
        plan = json.loads((tmp_path / "out" / "plan.json").read_text())
        assert len(done.stdout.splitlines()) == 1 + len(plan["sites"]) * len(plan["sources"])
