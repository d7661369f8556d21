"""What an unfinished `screen` or `find` has made, in a folder: the same call goes on from there.

Everything is named by a hash of all that decides it, so a call that asks otherwise finds nothing
of it, and one that asks for more uses what is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from fasttrace.attribution.result import Screen, read_screen, write_screen
from fasttrace.errors import StoreError
from fasttrace.store.disk import (
    OURS,
    Writing,
    disk_errors,
    lock,
    make_folder,
    remove_leftovers,
)
from fasttrace.store.journal import Appender, Journal, encode_values, read_lines
from fasttrace.types import Row

ROWS, PARTS, LOCK = "rows.jsonl", "parts.jsonl", f"{OURS}.lock"
WRITING = Writing("unfinished work in ", "everything finished is safe")


class Kept:
    """Rows, effects of parts and screens of a group of pairs, by key. From `keeping`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows = Journal(folder / ROWS)
        self.rows = {row.key: row for row in self._rows.rows}
        lines = read_lines(folder / PARTS, WRITING)
        self._parts = Appender(folder / PARTS, lines, WRITING)
        self._of_parts = {one["key"]: one for one in lines.values}

    @property
    def empty(self) -> bool:
        return not (self.rows or self._of_parts or any(self.folder.glob("*.safetensors")))

    def add_row(self, row: Row) -> None:
        self._rows.append(row)
        self.rows[row.key] = row

    def parts(self, key: str) -> tuple[np.ndarray, int] | None:
        """Effects, and the runs that they took."""
        found = self._of_parts.get(key)
        return None if found is None else (np.array(found["effects"], np.float64), found["runs"])

    def add_parts(self, key: str, effects: np.ndarray, runs: int) -> None:
        values = {"key": key, "effects": effects.tolist(), "runs": runs}
        try:
            self._parts.write(encode_values(values))
        except ValueError as error:
            raise StoreError(
                "an effect of a part is not a finite number. Run the model in float32, or use "
                "another metric."
            ) from error
        self._of_parts[key] = values

    def screen(self, key: str) -> Screen | None:
        file = self._screen(key)
        return read_screen(file) if file.is_file() else None

    def add_screen(self, key: str, screen: Screen) -> None:
        write_screen(self._screen(key), screen)

    def close(self) -> None:
        self._rows.close()
        self._parts.close()

    def _screen(self, key: str) -> Path:
        return self.folder / f"screen-{key[:32]}.safetensors"


@contextmanager
def keeping(folder: str | Path | None) -> Iterator[Kept | None]:
    """Opens it for one process at a time; one in which nothing was kept is taken away again.

    None gives None. Raises `StoreError` where it is in use, damaged or can't be written.
    """
    if folder is None:
        yield None
        return
    folder = Path(folder)
    make_folder(folder, WRITING)
    busy = f"another process works on {folder}. Wait until it has ended, or choose another folder."
    with lock(folder / LOCK, 0.0, busy, WRITING):
        remove_leftovers(folder)
        kept = Kept(folder)
        try:
            yield kept
        finally:
            kept.close()
            if kept.empty:
                clear(folder)


def clear(folder: Path) -> None:
    """Takes away what was kept, and the folder where nothing else is in it."""
    with disk_errors(folder, WRITING):
        for file in [*folder.glob("screen-*.safetensors"), *map(folder.joinpath, (ROWS, PARTS))]:
            file.unlink(missing_ok=True)
        (folder / LOCK).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
