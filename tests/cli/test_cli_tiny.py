"""The real tracer on a tiny pipeline, from the command line: killed, stopped, resumed, reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fasttrace.cli import main
from fasttrace.store import read_rows

ROOT = Path(__file__).parents[2]
COMMAND = "import sys; from fasttrace.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def arguments(folders: dict[str, Path]) -> list[str]:
    return [
        "trace", str(folders["sd"]), "--prompt", "a photo of a dog in the house", "--subject",
        "dog", "--attribute", "object", "--steps", "2", "--metric", "latent_recovery",
        "--component", "all", "--tokens", "last subject", "--tokens", "EOS", "--seeds", "0:2",
    ]  # fmt: skip


def start(arguments: list[str], out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments, "--out", str(out), "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for_rows(process: subprocess.Popen[str], out: Path, more_than: int) -> None:
    journal = out / "rows" / "shard-0-of-1.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") > more_than:
            return
        time.sleep(0.005)
    pytest.fail(f"no new row came: {process.communicate()}")


def test_killed_stopped_and_resumed(arguments: list[str], tmp_path: Path):
    """SIGKILL twice, Ctrl-C, then to the end: every row once, no finished one again."""
    out = tmp_path / "out"
    # So many that none ends before its signal comes, however late this process is scheduled.
    arguments = [*arguments[:-1], "0:4"]
    killed = 0
    for _ in range(2):
        process = start(arguments, out)
        wait_for_rows(process, out, more_than=killed + 3)
        process.kill()
        process.communicate()
        killed = len(read_rows(out))

    second = start(arguments, out)
    wait_for_rows(second, out, more_than=killed + 3)
    second.send_signal(signal.SIGINT)
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 130
    assert errors.endswith("fasttrace: stopped; run the same command again\n")
    stopped = len(read_rows(out))
    assert killed < stopped

    third = start(arguments, out)
    output, errors = third.communicate(timeout=120)
    assert third.returncode == 0, errors
    about = json.loads(output)
    keys = pq.read_table(out / "results.parquet")["key"].to_pylist()
    assert len(set(keys)) == len(keys) == about["rows"] == about["planned"]
    assert about["new"] == about["planned"] - stopped


def test_rows_report_and_refusals(arguments: list[str], tmp_path: Path, capsys):
    out = tmp_path / "out"
    few = [*arguments[:-1], "0", "--sites", "attn2", "--sites", "attn", "--out", str(out), "-q"]
    assert main(few) == 0
    rows = read_rows(out)
    assert {row.component for row in rows} == {"unet", "text_encoder"}
    assert {row.kind for row in rows} == {"attn2", "attn"}
    for row in rows:
        assert (out / "pictures" / f"{row.picture}.png").is_file()
    capsys.readouterr()

    assert main(["report", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == len(rows)
    page = (out / "report.html").read_text()
    assert page.count("data:image/webp;base64,") > 4
    assert "picture not kept" not in page

    assert main([*few, "--steps", "3"]) == 1
    assert "was made with steps=2; this call asks for steps=3" in capsys.readouterr().err
    assert main([*few, "--sites", "unet.nowhere"]) == 2  # though 'attn2' means something
    assert "unet.nowhere" in capsys.readouterr().err
    assert main([*arguments, "--sites", "attn2", "--out", str(out)]) == 2
    assert "--sites attn2 names nothing of text_encoder" in capsys.readouterr().err
    assert main([*arguments, "--sites", "unet.nowhere", "--out", str(out)]) == 2
    assert "unet.nowhere" in capsys.readouterr().err
    assert main([*few, "--subject", "cat"]) == 2
    assert "cat" in capsys.readouterr().err
