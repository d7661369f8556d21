"""The ledger: one append-only file, one checked line a row (of a shard, or of an evaluation).

A line is `{"row": {...}, "sum": "<16 hex digits>"}`; the sum is BLAKE2b over the row's bytes as
they stand in the file. A row counts once its line is whole. A kill can tear the last line only: it
is cut off on the next start and its row computed again. Damage anywhere else is never guessed at.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttrace.errors import StoreError
from fasttrace.store.disk import ROWS, Writing, disk_errors, write_all
from fasttrace.store.schema import row_from_dict, row_to_dict
from fasttrace.types import Row

_HEAD, _MIDDLE, _TAIL = b'{"row":', b',"sum":"', b'"}'
_SUM_CHARS = 16
_SYNC_SECONDS = 0.25  # the death of the process loses nothing; a power cut what came since


def _sum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_SUM_CHARS // 2).hexdigest().encode()


def encode_values(values: Mapping[str, Any], *, allow_nan: bool = False) -> bytes:
    """One line, newline included. Raises `ValueError` for a number that is not finite."""
    body = json.dumps(values, allow_nan=allow_nan, separators=(",", ":")).encode()
    return _HEAD + body + _MIDDLE + _sum(body) + _TAIL + b"\n"


def encode(row: Row) -> bytes:
    """One line, newline included. Raises `StoreError` for a number that is not finite."""
    try:
        return encode_values(row_to_dict(row))
    except ValueError as error:
        raise StoreError(
            f"the row of site {row.site!r} for prompt {row.prompt!r}, seed {row.seed}, holds a "
            f"number that is not finite (score {row.score}, clean {row.clean_score}, corrupt "
            f"{row.corrupt_score}). Run the model in float32, or use another metric."
        ) from error


def decode(line: bytes) -> dict[str, Any] | None:
    """The row's values, or None where the line is not whole. `line` has no newline."""
    frame = len(_MIDDLE) + _SUM_CHARS + len(_TAIL)
    body, rest = line[len(_HEAD) : -frame], line[-frame:]
    if not line.startswith(_HEAD) or rest != _MIDDLE + _sum(body) + _TAIL:
        return None
    values = json.loads(body)
    return values if isinstance(values, dict) else None


@dataclass(frozen=True)
class Lines:
    """What a file of such lines holds, and where its last whole line ends."""

    values: list[dict[str, Any]]
    good_bytes: int
    torn: bool


@dataclass(frozen=True)
class JournalContents:
    """What a journal holds: its rows, and where its last whole line ends."""

    rows: list[Row]
    good_bytes: int
    torn: bool


def read_lines(path: Path, writing: Writing = ROWS) -> Lines:
    """Read a file of lines, changing nothing; one that isn't there is empty.

    Raises `StoreError` naming a line damaged in the middle.
    """
    with disk_errors(path, writing):
        data = path.read_bytes() if path.exists() else b""
    found: list[dict[str, Any]] = []
    start, number = 0, 0
    while start < len(data):
        number += 1
        end = data.find(b"\n", start)
        values = decode(data[start:end]) if end >= 0 else None
        if values is None:
            if b"\n" not in data[start:].rstrip(b"\n\0"):
                return Lines(found, start, torn=True)
            raise StoreError(_damaged(path, number, len(found)))
        found.append(values)
        start = end + 1
    return Lines(found, start, torn=False)


def read_journal(path: Path) -> JournalContents:
    """Rows of a journal, changing nothing. Raises as `read_lines` does."""
    lines = read_lines(path)
    return JournalContents([row_from_dict(v) for v in lines.values], lines.good_bytes, lines.torn)


def _damaged(path: Path, number: int, before: int) -> str:
    return (
        f"{path}, line {number}, is damaged: its checksum does not match, so something other than "
        f"fasttrace changed the file. The {before} lines before it are whole. To go on, delete "
        f"that line (sed -i {number}d '{path}') and run the same command again: what it held is "
        "made anew."
    )


class Appender:
    """The writing end of a file of lines, from its last whole line on. One process at a time."""

    def __init__(self, path: Path, lines: Lines | JournalContents, writing: Writing = ROWS) -> None:
        self.path, self.writing = path, writing
        self._size = lines.good_bytes
        self._synced = 0.0
        with disk_errors(path, writing):
            # A link would have rows written into another file, and its last line cut off.
            flags = os.O_CREAT | os.O_RDWR | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
            self._handle = os.open(path, flags, 0o644)
            if lines.torn:
                os.ftruncate(self._handle, self._size)
                os.fsync(self._handle)

    def write(self, line: bytes) -> None:
        """Hand one line to the operating system. On a full disk the file is as it was before."""
        with disk_errors(self.path, self.writing):
            try:
                write_all(self._handle, line)
            except OSError:
                # Else the next line would be glued to this one's beginning.
                with suppress(OSError):
                    os.ftruncate(self._handle, self._size)
                raise
            self._size += len(line)
            if time.monotonic() - self._synced >= _SYNC_SECONDS:
                self.sync()

    def sync(self) -> None:
        """Wait until everything written so far is on the disk."""
        with disk_errors(self.path, self.writing):
            os.fsync(self._handle)
        self._synced = time.monotonic()

    def close(self) -> None:
        if self._handle < 0:
            return
        handle, self._handle = self._handle, -1
        with disk_errors(self.path, self.writing):
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


class Journal(Appender):
    """The writing end of a shard's rows: the store holds the shard's lock."""

    def __init__(self, path: Path) -> None:
        contents = read_journal(path)
        self.rows = contents.rows
        self.repaired = contents.torn
        super().__init__(path, contents)

    def append(self, row: Row) -> None:
        """As `write` does."""
        self.write(encode(row))
