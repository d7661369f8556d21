"""The ledger under truncation, damage and full disks."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fasttrace.errors import StoreError
from fasttrace.store import journal as journal_module
from fasttrace.store.journal import Journal, encode, read_journal


@pytest.fixture(scope="module")
def rows(fakes):
    return list(fakes.fake_sweep(attributes=("object",), prompts=1, components=("unet",)))[:5]


def test_every_line_is_json_with_row_and_sum(rows):
    line = encode(replace(rows[0], prompt="two\nlines \u2028 \U0001f409"))
    assert line.count(b"\n") == 1
    values = json.loads(line)
    assert set(values) == {"row", "sum"}
    assert values["row"]["prompt"] == "two\nlines \u2028 \U0001f409"


@given(data=st.data())
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_truncated_at_any_byte_keeps_whole_lines_and_goes_on(data, rows, tmp_path: Path):
    lines = [encode(row) for row in rows]
    whole = b"".join(lines)
    cut = data.draw(st.integers(0, len(whole)))
    path = tmp_path / "shard.jsonl"
    path.write_bytes(whole[:cut] + data.draw(st.sampled_from([b"", b"\0" * 7])))
    kept = sum(1 for i in range(len(lines)) if len(b"".join(lines[: i + 1])) <= cut)
    assert read_journal(path).rows == rows[:kept]
    book = Journal(path)
    assert book.rows == rows[:kept]
    for row in rows[kept:]:
        book.append(row)
    book.close()
    assert path.read_bytes() == whole


@given(position=st.integers(0, 10**6), change=st.integers(1, 255))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_changed_byte_is_never_believed(position, change, rows, tmp_path: Path):
    """Anywhere but in the last two lines, which may pass for a torn end (see below)."""
    lines = [encode(row) for row in rows]
    whole = bytearray(b"".join(lines))
    position %= len(b"".join(lines[:-2]))
    whole[position] ^= change
    path = tmp_path / "shard.jsonl"
    path.write_bytes(whole)
    number = next(i for i in range(len(lines)) if position < len(b"".join(lines[: i + 1]))) + 1
    with pytest.raises(StoreError, match=rf"line {number}, is damaged"):
        read_journal(path)


def test_a_damaged_end_costs_its_rows_and_nothing_else(rows, tmp_path: Path):
    lines = [encode(row) for row in rows]
    path = tmp_path / "shard.jsonl"
    path.write_bytes(b"".join(lines[:-1]) + lines[-1].replace(b"score", b"scorn"))
    assert read_journal(path).rows == rows[:-1]
    path.write_bytes(b"".join(lines[:-2]) + lines[-2].replace(b"\n", b"x") + lines[-1])
    assert read_journal(path).rows == rows[:-2]


def test_the_remedy_in_the_sentence_works(rows, tmp_path: Path):
    path = tmp_path / "shard.jsonl"
    lines = [encode(row) for row in rows]
    path.write_bytes(b"".join([lines[0], lines[1].replace(b'"seed":0', b'"seed":1'), *lines[2:]]))
    with pytest.raises(StoreError, match=r"line 2, is damaged.*sed -i 2d"):
        read_journal(path)
    path.write_bytes(b"".join([lines[0], *lines[2:]]))
    assert read_journal(path).rows == [rows[0], *rows[2:]]


def test_a_full_disk_leaves_the_ledger_as_it_was(rows, tmp_path: Path, monkeypatch):
    """ENOSPC after half a line: the half is taken back, a sentence is raised, later rows fit."""
    path = tmp_path / "shard.jsonl"
    book = Journal(path)
    book.append(rows[0])
    real = os.write
    calls = []

    def full(handle: int, view: memoryview) -> int:
        calls.append(len(view))
        if len(calls) == 1:
            return real(handle, bytes(view[: len(view) // 2]))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StoreError, match="the disk is full.*free some space and run the same"):
            book.append(rows[1])
    assert path.read_bytes() == encode(rows[0])
    for row in rows[1:]:
        book.append(row)
    book.close()
    assert read_journal(path).rows == rows


def test_numbers_that_are_not_finite_are_refused(rows):
    with pytest.raises(StoreError, match="not finite.*float32"):
        encode(replace(rows[0], score=float("nan")))


def test_rows_reach_the_system_at_once_and_the_disk_often(rows, tmp_path: Path, monkeypatch):
    synced = []
    monkeypatch.setattr(journal_module.os, "fsync", lambda handle: synced.append(handle))
    now = iter([0.0, 0.0, 0.1, 0.2, 1.0, 1.0, 1.1, 1.2, 1.3])
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: next(now))
    path = tmp_path / "shard.jsonl"
    book = Journal(path)
    for count, row in enumerate(rows, start=1):
        book.append(row)
        assert len(path.read_bytes().splitlines()) == count
    book.close()
    assert 2 <= len(synced) <= len(rows)
