"""`fasttrace screen` on a tiny pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fasttrace.attribution.result import load_screen
from fasttrace.cli import main

PROMPT = ["--prompt", "a photo of a red dog", "--subject", "dog", "--steps", "2"]


@pytest.fixture
def run(folders, capsys):
    def call(*arguments: object) -> tuple[int, str, str]:
        code = main(["screen", str(folders["sd"]), *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def test_the_table_is_what_was_saved(run, tmp_path: Path):
    out = tmp_path / "out"
    code, printed, errors = run(*PROMPT, "--by", "site,token", "--out", out, "--top", 3)
    assert code == 0, errors
    screen = load_screen(out)
    first = screen.ranking()[0]
    assert first.site in printed
    assert f"{first.effect:+.4g}" in printed
    assert f"site (3 of {len(screen.ranking())})" in printed
    assert "key by token" in printed
    assert "value by token" in printed
    best = screen.ranking("token", part="value")[0]
    assert f"{best.coordinate} " in printed
    assert "First-order effects" in printed
    assert f"{screen.generations:.1f} generations" in printed
    assert "1/1 pairs" in errors


def test_json_alone_on_stdout(run, tmp_path: Path):
    probes = tmp_path / "probes.json"
    entries = [
        {"prompt": "a photo of a red dog", "subject": "dog", "attribute": "object", "seeds": [3, 4]}
    ]
    probes.write_text(json.dumps({"schema": 1, "probes": entries}))
    code, printed, _ = run(
        "--probes", probes, "--steps", 2, "--window", "0:1", "--window", "0:2", "--branch", "both",
        "--estimator", "averaged:2", "--horizon", 1, "--json", "--top", 2,
    )  # fmt: skip
    assert code == 0
    found = json.loads(printed)
    assert [(p["seed"], p["probe"]["attribute"]) for p in found["pairs"]] == [
        (3, "object"), (4, "object"),
    ]  # fmt: skip
    assert (found["estimator"], found["horizon"]) == ("averaged:2", 1)
    assert found["branches"] == ["cond", "uncond"]
    assert [r["window"] for r in found["rankings"]] == [[0, 1], [0, 2]]
    assert all(len(r["top"]) == 2 < r["places"] for r in found["rankings"])
    assert found["generations"] > 0


def test_text_encoder(run):
    code, printed, errors = run(*PROMPT, "--component", "text_encoder", "--top", 4, "-q")
    assert code == 0, errors
    assert "dog" in printed  # tokens have their words
    assert errors == ""


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("either --prompt with --subject, or --probes", []),
        ("--prompt needs --subject", ["--prompt", "a dog"]),
        ("Unknown estimator 'magic'", [*PROMPT, "--estimator", "magic"]),
        ("'brick'", [*PROMPT, "--by", "brick"]),
        ("one component", [*PROMPT, "--component", "all"]),
        ("a text-encoder site acts", [*PROMPT, "--component", "text_encoder", "--window", "0:1"]),
        ("one metric", [*PROMPT, "--metric", "latent_recovery,latent_distance"]),
        ("horizon", [*PROMPT, "--horizon", "0"]),
        ("--top 0", [*PROMPT, "--top", "0"]),
        ("--dtype 'int8'", [*PROMPT, "--dtype", "int8"]),
        ("--window '1-2'", [*PROMPT, "--window", "1-2"]),
        ("lanes", [*PROMPT, "--lanes", "0"]),
    ],
)
def test_wrong_calls(run, tmp_path: Path, words: str, arguments: list[str]):
    out = tmp_path / "out"
    code, printed, errors = run(*arguments, "--out", out)
    assert code == 2
    assert words in errors
    assert errors.startswith("fasttrace: ")
    assert errors.count("\n") == 1
    assert printed == ""
    assert not out.exists()


def test_a_folder_that_is_there_is_refused(run, tmp_path: Path):
    (tmp_path / "kept").write_text("mine")
    code, _, errors = run(*PROMPT, "--out", tmp_path)
    assert code == 2
    assert "exists already" in errors
    assert (tmp_path / "kept").read_text() == "mine"
