"""`fasttrace trace --until` on a tiny pipeline: killed, resumed, refused, reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fasttrace import Tracer
from fasttrace.cli import main
from fasttrace.store import SettledRecord, read_rows

ROOT = Path(__file__).parents[2]
COMMAND = "import sys; from fasttrace.cli import main; sys.exit(main())"
UNTIL = ["--until", "top10%@95"]


@pytest.fixture(scope="module")
def arguments(folders: dict[str, Path], tmp_path_factory) -> list[str]:
    entries = [
        {"prompt": prompt, "subject": subject, "attribute": "object"}
        for prompt, subject in (("a photo of a red dog", "dog"), ("a blue bird", "bird"))
    ]
    probes = tmp_path_factory.mktemp("probes") / "probes.json"
    probes.write_text(json.dumps({"schema": 1, "probes": entries}))
    return [
        "trace", str(folders["sd"]), "--probes", str(probes), "--seeds", "0:10", "--steps", "2",
        "--metric", "latent_recovery", "--no-pictures", "--engine", "reference",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(arguments: list[str], tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main([*arguments, *UNTIL, "--out", str(out), "-q"]) == 0
    return out


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Keys of the rows that this process made, finished ones that it made again included."""
    keys: list[str] = []
    real = Tracer.iter_rows

    def iter_rows(self, plan, **options):
        for row, pictures in real(self, plan, **options):
            keys.append(row.key)
            yield row, pictures

    monkeypatch.setattr(Tracer, "iter_rows", iter_rows)
    return keys


def test_killed_it_goes_on_and_ends_the_same(arguments, whole, tmp_path: Path, capsys, ran):
    """SIGKILL within the first look's pairs and after it: no finished row is made again, and with
    the same rows come the same decisions."""
    out = tmp_path / "out"
    journal = out / "rows" / "shard-0-of-1.jsonl"
    finished = 0
    for more in (30, 101):  # 20 sites, so the first look is after 100 rows
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments, *UNTIL, "--out", str(out), "-q"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if journal.exists() and journal.read_bytes().count(b"\n") > more:
                break
            time.sleep(0.005)
        assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
        finished = len(read_rows(out))
        assert finished > more
    last = json.loads((out / "until.json").read_text())
    assert (last["settled"], last["visited"]) == (False, 5)
    assert "Not settled yet" in last["words"]

    capsys.readouterr()
    assert main([*arguments, *UNTIL, "--out", str(out), "--json"]) == 0
    printed = capsys.readouterr()
    about = json.loads(printed.out)
    for row, other in zip(read_rows(out), read_rows(whole), strict=True):
        assert row.key == other.key
        assert row.score == pytest.approx(other.score, abs=1e-5)
    record = SettledRecord.read(out)
    assert record is not None
    assert about["until"] == record.model_dump()
    same(record, SettledRecord.read(whole))
    assert about["new"] == about["rows"] - finished == len(ran) > 0
    assert about["rows"] < about["planned"]
    assert f"latent_recovery: {about['until']['words']}" in printed.err
    assert "after 5 pairs: " in printed.err
    lines = journal.read_text().splitlines()
    assert len(lines) == len({json.loads(line)["row"]["key"] for line in lines}) == about["rows"]

    assert main([*arguments, *UNTIL, "--out", str(out), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["new"], again["until"]) == (0, about["until"])
    assert len(ran) == about["new"]


def same(record: SettledRecord, other: SettledRecord | None) -> None:
    """But for the rounding of scores."""
    assert other is not None
    assert record.model_copy(update={"sites": []}) == other.model_copy(update={"sites": []})
    for one, its in zip(record.sites, other.sites, strict=True):
        mine, theirs = one.model_dump(), its.model_dump()
        for name in ("effect", "lead", "half"):
            assert mine.pop(name) == pytest.approx(theirs.pop(name), abs=1e-4)
        assert mine == theirs


def test_with_every_row_there_nothing_runs(arguments, tmp_path: Path, capsys, ran):
    out = tmp_path / "out"
    few = [*arguments, "--sites", "attn2", "--out", str(out)]
    assert main([*few, "-q"]) == 0
    rows = read_rows(out)
    assert not (out / "until.json").exists()
    capsys.readouterr()
    assert main([*few, *UNTIL, "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["new"] == 0
    assert len(ran) == len(rows)
    assert about["until"]["settled"]
    assert read_rows(out) == rows


def test_a_budget_and_then_a_larger_one(arguments, tmp_path: Path, capsys):
    out = tmp_path / "out"
    few = [*arguments, "--sites", "attn2", "--until", "top1@99.9", "--out", str(out), "--json"]
    assert main([*few, "--budget", "20"]) == 0
    first = json.loads(capsys.readouterr().out)
    sites = len(first["until"]["sites"])
    assert first["until"]["budget"] == 20
    assert (
        first["until"]["spent"]
        == 20 // (sites + 2) * (sites + 2)
        == first["new"] + 2 * (20 // (sites + 2))
    )
    assert first["until"]["why"] == "budget"
    assert main([*few, "--budget", "35"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert first["until"]["spent"] < second["until"]["spent"] <= 35
    assert second["new"] == second["rows"] - first["rows"]


def test_the_report_says_it(whole, capsys):
    record = SettledRecord.read(whole)
    assert record is not None
    assert main(["report", str(whole)]) == 0
    printed = capsys.readouterr().out
    assert f"latent_recovery: {record.words}" in printed
    assert "averages are over different pairs" in printed
    assert main(["report", str(whole), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["until"] == record.model_dump()
    page = (whole / "report.html").read_text()
    assert record.words in page
    assert "Unfinished" not in page


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ("leave --shard out", [*UNTIL, "--shard", "0/2"]),
        ("one --component", [*UNTIL, "--component", "all"]),
        ("can't be read", ["--until", "ten"]),
        ("give --until as well", ["--budget", "100"]),
        ("1 or more, not 0", [*UNTIL, "--budget", "0"]),
        ("less than one pair takes", [*UNTIL, "--budget", "5"]),
        ("one window", [*UNTIL, "--window", "0:1", "--window", "1:2"]),
        ("no choice", ["--until", "top500"]),
        ("--budget", [*UNTIL, "--budget", "1.5"]),
    ],
)
def test_refused(arguments, tmp_path: Path, capsys, words, given):
    out = tmp_path / "out"
    assert main([*arguments, *given, "--out", str(out)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err
    assert not out.exists()


def test_one_component_a_directory(arguments, whole, capsys):
    """Else the second record would hide the first one, and its caution."""
    before = (whole / "until.json").read_bytes()
    text = [*arguments, *UNTIL, "--component", "text_encoder", "--out", str(whole)]
    assert main(text) == 2
    assert "holds an adaptive sweep of unet" in capsys.readouterr().err
    assert (whole / "until.json").read_bytes() == before


def test_memory_is_another_option(arguments, tmp_path: Path, capsys):
    assert main([*arguments, "--cache", "-1", "--out", str(tmp_path / "out")]) == 2
    assert "--cache -1.0 is not a positive number of GiB" in capsys.readouterr().err
