"""An evaluation's folder: judgements are kept as they come, so that a kill loses one batch.

DIR/judging.jsonl          the question, then a line for each picture judged
DIR/pictures/<hash>.png    written before the line that names them
DIR/judgements.parquet     the whole table, written at the end
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fasttrace.errors import StoreError
from fasttrace.store.disk import (
    JUDGEMENTS,
    OURS,
    disk_errors,
    lock,
    make_folder,
    remove_leftovers,
    write_atomic,
)
from fasttrace.store.journal import Appender, encode_values, read_lines
from fasttrace.store.judgements import write_judgements
from fasttrace.store.pictures import save_picture
from fasttrace.types import Judgement

LEDGER, PICTURES = "judging.jsonl", "pictures"
FORMAT = 1  # of the ledger; another one's judgements are made anew
Unit = tuple[str, str, int]  # edit, prompt, seed: one picture judged
_NAMED = re.compile(r"[0-9a-f]{24}\.png")  # content hashes: pictures of ours


class Evaluation:
    """The writing end, from `Evaluation.open`. A context manager.

    rows: all judgements so far. begun_anew: in which values the question that was there before
    differed, so that its judgements were left behind; empty where there was none or the same.
    """

    def __init__(
        self,
        folder: Path,
        rows: Iterable[Judgement],
        begun_anew: Mapping[str, tuple[Any, Any]],
        ledger: Appender,
        locks: ExitStack,
    ) -> None:
        self.folder, self.rows, self.begun_anew = folder, list(rows), begun_anew
        self._ledger, self._locks = ledger, locks
        self._done = {unit_of(row) for row in self.rows}

    @classmethod
    def open(cls, folder: Path, question: Mapping[str, Any]) -> Self:
        """Begin, or go on where the same question was left.

        question: every value that determines a judgement, by its name. Raises `StoreError` where
        the folder can't be written, its ledger is damaged, or another process is judging there.
        """
        asked = json.loads(json.dumps({"format": FORMAT, **question}))  # as the file gives it
        path = folder / LEDGER
        make_folder(folder / PICTURES, JUDGEMENTS)
        with ExitStack() as stack:
            stack.enter_context(
                lock(
                    folder / f"{OURS}-judging.lock",
                    0.0,
                    f"another process is judging in {folder}. Wait until it has ended, or choose "
                    "another --out.",
                    JUDGEMENTS,
                )
            )
            for each in (folder, folder / PICTURES):
                remove_leftovers(each)
            lines = read_lines(path, JUDGEMENTS)
            before: dict[str, Any] | None = None
            if lines.values:
                before = lines.values[0].get("question")
                if before is None:
                    raise StoreError(
                        f"{path} doesn't say what was asked: its first line is gone. Delete it, "
                        "and run the same command again: all is judged anew."
                    )
            if before != asked:
                # One file for both: there is no moment at which lines answer another question.
                write_atomic(path, encode_values({"question": asked}), JUDGEMENTS)
                lines = read_lines(path, JUDGEMENTS)
            ledger = Appender(path, lines, JUDGEMENTS)
            stack.callback(ledger.close)
            rows = [Judgement(**j) for line in lines.values[1:] for j in line["judgements"]]
            changed = {} if before is None else differences(before, asked)
            return cls(folder, rows, changed, ledger, stack.pop_all())

    @property
    def done(self) -> frozenset[Unit]:
        """What is judged already."""
        return frozenset(self._done)

    def add(self, found: Sequence[Judgement], pictures: Mapping[str, Any]) -> None:
        """Write the pictures, then the judgements of one unit; nothing where it was there already.

        Raises `StoreError`; the unit then does not count.
        """
        if not found or unit_of(found[0]) in self._done:
            return
        for name, picture in pictures.items():
            save_picture(self.folder / PICTURES, name, picture, JUDGEMENTS)
        values = {"judgements": [asdict(row) for row in found]}
        self._ledger.write(encode_values(values, allow_nan=True))  # a score may be missing
        self._done.add(unit_of(found[0]))
        self.rows += found

    def finish(self, rows: Sequence[Judgement]) -> Path:
        """Write the table of `rows`, in their order; pictures of other questions are removed."""
        self._ledger.sync()
        table = write_judgements(self.folder, rows)
        named = {f"{n}.png" for r in rows for n in (r.picture_before, r.picture_after)}
        with disk_errors(self.folder, JUDGEMENTS):
            for file in (self.folder / PICTURES).iterdir():
                if _NAMED.fullmatch(file.name) and file.name not in named:
                    file.unlink(missing_ok=True)
        return table

    def close(self) -> None:
        """Flush and let the folder go; a second call does nothing."""
        self._locks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def unit_of(row: Judgement) -> Unit:
    return row.edit, row.prompt, row.seed


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """By name, what it was and what it is now, where that differs."""
    names = dict.fromkeys([*now, *before])
    return {
        name: (before.get(name), now.get(name))
        for name in names
        if before.get(name) != now.get(name)
    }
