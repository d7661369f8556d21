"""`fasttrace find` on a tiny pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fasttrace.attribution.found import load_found
from fasttrace.cli import main

PROMPT = ["--prompt", "a photo of a red dog", "--subject", "dog", "--steps", "2"]
FEW = ["--top", "3", "--audit", "3", "--groups", "2", "--inside", "1"]


@pytest.fixture
def run(folders, capsys):
    def call(*arguments: object) -> tuple[int, str, str]:
        code = main(["find", str(folders["sd"]), *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def test_what_is_said_is_what_was_saved(run, tmp_path: Path):
    out = tmp_path / "out"
    code, printed, errors = run(*PROMPT, *FEW, "--out", out)
    assert code == 0, errors
    found = load_found(out)
    assert str(found) in printed
    assert f"Page: {out / 'found.html'}" in printed
    assert (out / "found.html").is_file()
    assert "1/1 pairs" in errors
    assert f"{len(found.rows)}/{len(found.rows)} rows" in errors
    code, _, errors = run(*PROMPT, *FEW, "--out", out)
    assert code == 2
    assert "exists already" in errors


def test_json_alone_on_stdout(run):
    code, printed, _ = run(*PROMPT, *FEW, "--json", "--seeds", "0:2", "--window", "0:1")
    assert code == 0
    found = json.loads(printed)
    assert found["pairs"] == 2
    assert found["page"] is None
    assert found["audit"]["sample"] == 3
    assert len(found["places"]) == len(found["names"])


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("--prompt", []),
        ("top is a whole number", [*PROMPT, "--top", 0]),
        ("one window", [*PROMPT, "--window", "0:1", "--window", "1:2"]),
        ("one --metric", [*PROMPT, "--metric", "clip_score,attribute"]),
        ("one component", [*PROMPT, "--component", "all"]),
        ("estimator", [*PROMPT, "--estimator", "best"]),
        ("--dtype", [*PROMPT, "--dtype", "int8"]),
    ],
)
def test_bad_input(run, tmp_path, words, arguments):
    out = tmp_path / "out"
    code, printed, errors = run(*arguments, "--out", out)
    assert code == 2
    assert words in errors
    assert "Traceback" not in errors
    assert printed == ""
    assert not out.exists()
