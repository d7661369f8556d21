"""The bench of the ops runs, checks before it times, and writes what it says it does."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def bench(*command):
    # pytest-benchmark measures nothing where it sees pytest-xdist.
    alone = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=alone | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_quick_run(tmp_path):
    ran = bench("bench/ops.py", "--quick", "--out", str(tmp_path / "ops.csv"))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    with (tmp_path / "ops.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:6] == ["op", "shape", "dtype", "form", "median_s", "ratio"]
    found = {row["op"] for row in rows}
    assert found == {"patch_rows_", "guided_step_"}
    for row in rows:
        assert float(row["median_s"]) > 0
        assert float(row["error"]) < 1e-4
        if row["form"] == "fasttrace":
            assert float(row["ratio"]) == 1
            ours = float(row["median_s"])
        else:
            assert float(row["ratio"]) == pytest.approx(float(row["median_s"]) / ours, rel=1e-2)
        assert f"| {row['shape']} | {row['dtype']} | {row['form']} |" in ran.stdout
    assert "load average" in ran.stdout
    assert "benchmark 'guided_step_'" in ran.stderr


ON_CUDA_ALONE = """
import sys
sys.path.insert(0, "bench")
import torch
import op_cases
from op_bench import check
cpu = torch.device("cpu")
for dtype in (torch.float16, torch.bfloat16):
    for sizes in ((3, 2, 33, 77, 40), (3, 2, 20, 20, 64)):
        for patched in (0, 1):
            with torch.no_grad():
                errors = check(op_cases.patch_attention_case(sizes, patched, dtype, cpu))
            assert errors.keys() == {op_cases.OURS, op_cases.SDPA}, errors
            assert all(isinstance(error, float) for error in errors.values()), errors
"""


def test_the_attention_that_only_cuda_times():
    """Its forms agree here as well; what it takes is told by a GPU alone."""
    ran = bench("-c", ON_CUDA_ALONE)
    assert ran.returncode == 0, ran.stderr


BROKEN = """
import sys
sys.path.insert(0, "bench")
import op_cases
right = op_cases.patch_rows_
op_cases.patch_rows_ = lambda out, source, index, strength: right(out, source, index, strength / 2)
import op_bench
sys.argv = ["ops.py", "--quick", "--op", "patch_rows_", "--out", sys.argv[1]]
sys.exit(op_bench.main(""))
"""


def test_a_form_that_is_wrong_has_no_row(tmp_path):
    ran = bench("-c", BROKEN, str(tmp_path / "ops.csv"))
    assert ran.returncode == 1
    assert "differs from the reference: relative error" in ran.stderr
    assert (tmp_path / "ops.csv").read_text().count("\n") == 1
