"""Writing so that a kill at any moment leaves either the old file or the new one.

The operating system's refusals (full, read-only, not a folder) become sentences here.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from fasttrace.errors import StoreError

OURS = ".fasttrace"  # hidden names with this prefix are locks and unfinished files


class Writing(NamedTuple):
    """What is being written, and what is left where that fails."""

    what: str
    kept: str


ROWS = Writing("", "every finished row is safe")
JUDGEMENTS = Writing("the evaluation's ", "every finished judgement is safe")
EDIT = Writing("the edit ", "nothing of it was kept")


@contextmanager
def disk_errors(path: Path, writing: Writing = ROWS) -> Iterator[None]:
    """Turn an OSError about `path` into a `StoreError` that says what to do."""
    try:
        yield
    except OSError as error:
        raise StoreError(disk_sentence(error, path, writing)) from error


def disk_sentence(error: OSError, path: Path, writing: Writing = ROWS) -> str:
    """What went wrong there, and what to do."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk is full: {writing.what}{path} could not be written ({reason}). "
            f"{writing.kept.capitalize()}; free some space and run the same command again to go on."
        )
    return (
        f"{writing.what}{path} can't be used ({reason}). Choose another directory with --out, or "
        f"mend this one and run the same command again; {writing.kept}."
    )


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while `path` is read into a `StoreError`."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{path} can't be read ({error.strerror or error}).") from error


@contextmanager
def lock(path: Path, timeout: float, busy: str, writing: Writing = ROWS) -> Iterator[None]:
    """An operating-system lock: it ends with the process, so a kill never leaves it behind.

    Raises `StoreError` with `busy` where another process has held it for `timeout` seconds.
    """
    held = FileLock(path)
    with disk_errors(path, writing):
        try:
            held.acquire(timeout=timeout)
        except Timeout as error:
            raise StoreError(busy) from error
    try:
        yield
    finally:
        held.release()


def write_all(handle: int, data: bytes) -> None:
    """`os.write` until everything is written: one call may take only a part."""
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def write_atomic(path: Path, data: bytes, writing: Writing = ROWS) -> None:
    """Write beside `path`, flush to the disk, rename over it. Raises `StoreError`."""
    temporary = path.parent / f"{OURS}-{secrets.token_hex(6)}.tmp"
    with disk_errors(path, writing):
        try:
            handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            try:
                write_all(handle, data)
                os.fsync(handle)
            finally:
                os.close(handle)
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def sync_folder(path: Path) -> None:
    """Make renames and new files in `path` survive a power cut, where the system can."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def make_folder(path: Path, writing: Writing = ROWS) -> None:
    """Create `path` and its parents. Raises `StoreError` where something else is in the way."""
    with disk_errors(path, writing):
        path.mkdir(parents=True, exist_ok=True)


def remove_leftovers(path: Path, older_than: float = 3600.0) -> None:
    """Remove unfinished files that a kill left in `path` more than `older_than` seconds ago.

    Younger ones may belong to another shard that is writing right now.
    """
    with suppress(OSError):
        for leftover in path.glob(f"{OURS}-*.tmp"):
            if time.time() - leftover.stat().st_mtime > older_than:
                leftover.unlink(missing_ok=True)
