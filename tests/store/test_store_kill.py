"""Killed at any moment and started again: every row once, recomputed at most the work in flight."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fasttrace.store import read_rows

HERE = Path(__file__).parent
KILLS = 24
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(HERE / script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output


def kill_somewhere(process: subprocess.Popen[str], log: Path, dice: random.Random) -> None:
    """Most kills fall between rows; some while the process is still starting."""
    before = log.stat().st_size if log.exists() else 0
    deadline = time.monotonic() + 60
    if dice.random() < 0.8:
        while time.monotonic() < deadline and process.poll() is None:
            if log.exists() and log.stat().st_size > before:
                break
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.06))
    else:
        time.sleep(dice.uniform(0, 0.6))
    process.kill()
    process.communicate()


def test_twenty_four_random_kills(tmp_path: Path, fakes):
    out, log = tmp_path / "out", tmp_path / "log"
    dice = random.Random(7)
    for _ in range(KILLS):
        kill_somewhere(start("sweep_script.py", out, log), log, dice)
    survived = len(read_rows(out)) if out.exists() else 0
    finish(start("sweep_script.py", out, log))

    expected = list(fakes.fake_sweep(("object", "style"), prompts=2, components=("unet",)))
    keys = pq.read_table(out / "results.parquet")["key"].to_pylist()
    assert sorted(keys) == sorted(row.key for row in expected)
    assert read_rows(out) == sorted(expected, key=lambda row: keys.index(row.key))
    computed = Counter(log.read_text().split())
    again = sum(computed.values()) - len(expected)
    assert 0 < survived < len(expected), "the kills should fall inside the sweep"
    assert 0 <= again <= KILLS * 8, f"{again} rows computed again in {KILLS} kills of batches of 8"


def test_killed_at_every_disk_call(tmp_path: Path):
    assert int(finish(start("crash_script.py", tmp_path))) > 60


def test_shards_side_by_side_equal_one_process(tmp_path: Path):
    whole, split = tmp_path / "whole", tmp_path / "split"
    processes = [start("sweep_script.py", whole, tmp_path / "log")]
    processes += [start("sweep_script.py", split, tmp_path / f"log{i}", i, 3) for i in range(3)]
    for process in processes:
        finish(process)
    assert (split / "results.parquet").read_bytes() == (whole / "results.parquet").read_bytes()
    assert len(list((split / "rows").glob("*.jsonl"))) == 3
    logs = [set((tmp_path / f"log{i}").read_text().split()) for i in range(3)]
    assert sum(len(log) for log in logs) == len(logs[0] | logs[1] | logs[2])


@pytest.mark.parametrize("killed", [True, False])
def test_a_second_process_on_one_shard_is_refused(killed: bool, tmp_path: Path):
    """Refused while the first one lives; free at once when it was killed."""
    first = start("sweep_script.py", tmp_path / "out", tmp_path / "log")
    while not (tmp_path / "log").exists():
        time.sleep(0.005)
        assert first.poll() is None
    if killed:
        first.kill()
        first.communicate()
        finish(start("sweep_script.py", tmp_path / "out", tmp_path / "log"))
        return
    os.kill(first.pid, 19)  # SIGSTOP: holds its lock for as long as we like
    try:
        second = start("sweep_script.py", tmp_path / "out", tmp_path / "log")
        _, errors = second.communicate(timeout=60)
        assert second.returncode == 1
        assert "another process is writing shard 0/1" in errors
        third = start("sweep_script.py", tmp_path / "out", tmp_path / "log2", 1, 2)
        finish(third)
    finally:
        os.kill(first.pid, 18)
        finish(first)
