"""What the documents and pyproject.toml claim is what is tested."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
FIRST = "| family | sites"
# How a family's parameter goes on in the test of a column.
SUFFIX = {"UNet trace": "-unet]", "text trace": "-text_encoder]", "LoRA export": "-peft]"}


def tables() -> dict[str, list[list[str]]]:
    """Rows of cells of each table of families, by the document it is in."""
    found = {}
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        lines = path.read_text(encoding="utf-8").splitlines()
        starts = [i for i, line in enumerate(lines) if line.startswith(FIRST)]
        for start in starts:
            rows = []
            for line in lines[start:]:
                if not line.startswith("|"):
                    break
                rows.append([cell.strip() for cell in line.strip("|").split("|")])
            found[path.name] = rows
    return found


@pytest.fixture(scope="module")
def collected() -> set[str]:
    """Every test that the tables' last rows name, with its parameters."""
    files = {
        cell.strip("`").partition("::")[0]
        for rows in tables().values()
        for cell in rows[-1][1:]
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    return {line for line in done.stdout.splitlines() if "::" in line}


def unbacked(rows: list[list[str]], collected: set[str]) -> list[str]:
    """Cells that no test stands behind, and tests that contradict a "no"."""
    heads, tests = rows[0], rows[-1]
    found = []
    for row in rows[2:-1]:
        (family,) = re.findall(r"`([\w-]+)`", row[0])
        for head, cell, test in list(zip(heads, row, tests, strict=True))[1:]:
            name = test.strip("`")
            if head.startswith("sites"):
                # The listing's test has an architecture's name, which differs for the first family.
                known = "sd15" if family == "sd" else family
                unet, text = (int(number) for number in cell.split("+"))
                start = f"{name}[{known}-{unet}-{text or None}-"
                backed, said = any(test.startswith(start) for test in collected), True
            else:
                backed = f"{name}[{family}{SUFFIX.get(head, ']')}" in collected
                said = {"yes": True, "no": False}[cell]
            if backed != said:
                found.append(f"{family}: {head} {cell}")
    return found


def test_every_cell_of_the_family_table_has_its_test(collected):
    found = tables()
    assert found
    for name, rows in found.items():
        assert unbacked(rows, collected) == [], name
        assert len(rows) == 10


@pytest.mark.parametrize(
    ("row", "column", "cell"), [(2, 1, "71 + 36"), (6, 5, "yes"), (3, 2, "no"), (8, 6, "yes")]
)
def test_a_wrong_cell_is_found(row, column, cell, collected):
    rows = [list(cells) for cells in next(iter(tables().values()))]
    rows[row][column] = cell
    assert len(unbacked(rows, collected)) == 1


def test_the_oldest_versions_tested_are_the_lower_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    claimed = {r.name: r for r in map(Requirement, project["dependencies"])}
    lines = (ROOT / ".ci" / "contract.txt").read_text(encoding="utf-8").splitlines()
    tried = [line.split() for line in lines if not line.startswith("#")]
    assert [name for name, _, _ in tried] == ["diffusers", "transformers"]
    for name, oldest, newest in tried:
        (bound,) = (s.version for s in claimed[name].specifier if s.operator == ">=")
        assert oldest in (bound, f"{bound}.0")
        assert newest in claimed[name].specifier
