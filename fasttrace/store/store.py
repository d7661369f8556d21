"""A results directory: open it, add rows, finish; killed at any moment it is resumable.

DIR/fasttrace.json            what it was made with
DIR/rows/shard-0-of-1.jsonl   the ledger, one file a shard
DIR/pictures/<hash>.png       written before the row that names them
DIR/results.parquet           the whole table, made from the ledger
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fasttrace.errors import StoreError, UsageError
from fasttrace.store.disk import (
    OURS,
    lock,
    make_folder,
    remove_leftovers,
    sync_folder,
    write_atomic,
)
from fasttrace.store.journal import Journal, read_journal
from fasttrace.store.manifest import Call, Manifest
from fasttrace.store.pictures import save_picture
from fasttrace.store.schema import from_parquet, to_parquet
from fasttrace.types import Row

RESULTS = "results.parquet"
_LEDGER_WAIT = 30.0  # seconds; the ledger's lock is held only for reading and writing the manifest


@dataclass(frozen=True)
class Shard:
    """This process's share: pairs whose number modulo `count` is `index`."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise UsageError(
                f"shard {self.index}/{self.count} does not exist: i/n needs 0 <= i < n."
            )

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def owns(self, pair_number: int) -> bool:
        return pair_number % self.count == self.index


class Store:
    """The writing end of a results directory, from `Store.open`. A context manager."""

    def __init__(
        self, out: Path, manifest: Manifest, journal: Journal, keys: set[str], locks: ExitStack
    ) -> None:
        self.out = out
        self.manifest = manifest
        self._journal = journal
        self._locks = locks
        self._keys = keys

    @classmethod
    def open(
        cls,
        out: Path | str,
        *,
        fixed: Mapping[str, Any],
        call: Call,
        resolved: Mapping[str, Any] | None = None,
        shard: Shard | None = None,
    ) -> Store:
        """Create the directory, or go on with it.

        fixed: the values that may never change within it (see `Manifest`). resolved: values worked
        out from the plan, kept for later calls. Raises `StoreError` where the directory is
        foreign, damaged, unwritable, made with other values, or its shard is being written.
        """
        out, shard = Path(out), shard or Shard()
        Manifest.read(out)  # a foreign directory is refused before anything is written into it
        make_folder(out)
        with ExitStack() as stack:
            with _ledger(out):
                manifest = Manifest.read(out)
                if manifest is None:
                    manifest = Manifest(fixed=dict(fixed), resolved=dict(resolved or {}))
                    manifest.write(out)  # before the folders: without it they would look foreign
                manifest.refuse_other(out, fixed)
                for folder in (out / "rows", out / "pictures"):
                    make_folder(folder)
                    remove_leftovers(folder)
                stack.enter_context(
                    lock(
                        out / "rows" / f"{OURS}-{_stem(shard)}.lock",
                        0.0,
                        f"another process is writing shard {shard} of {out}. Wait until it has "
                        "ended, or split the work: --shard 0/2 here and --shard 1/2 there.",
                    )
                )
                rows = read_rows(out)
                copied = rows if not _journals(out) else []
                manifest.calls.append(call)
                manifest.write(out)
                journal = Journal(out / "rows" / f"{_stem(shard)}.jsonl")
                stack.callback(journal.close)
                for row in copied:  # the ledger was left behind; the table goes on without it
                    journal.append(row)
                sync_folder(out / "rows")
            return cls(out, manifest, journal, {row.key for row in rows}, stack.pop_all())

    def done(self, key: str) -> bool:
        """Whether the row of this key is in the ledger, whichever shard wrote it."""
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, row: Row, pictures: Mapping[str, Any] | None = None) -> bool:
        """Write pictures, then the row that names them. False where the row was there already.

        Raises `StoreError` (full disk, number that is not finite); the row then does not count.
        """
        if row.key in self._keys:
            return False
        for name, picture in (pictures or {}).items():
            save_picture(self.out / "pictures", name, picture)
        self._journal.append(row)
        self._keys.add(row.key)
        return True

    def finish(self) -> Path:
        """Put every shard's rows into `results.parquet`; its path."""
        self._journal.sync()
        return merge(self.out)

    def close(self) -> None:
        """Flush and let the shard go; a second call does nothing."""
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


def require(out: Path | str) -> Manifest:
    """The manifest of a results directory. Raises `StoreError` where there is none."""
    manifest = Manifest.read(Path(out))
    if manifest is None:
        raise StoreError(f"{out} holds no results. Make some with: fasttrace trace ... --out {out}")
    return manifest


def read_rows(out: Path | str) -> list[Row]:
    """Every row of a directory exactly once, in the table's order; safe while shards are writing.

    Where the ledger is gone (a copied directory), `results.parquet` is read instead. Raises
    `StoreError` where either is damaged.
    """
    out = Path(out)
    journals = _journals(out)
    by_key: dict[str, Row] = {}
    for path in journals:
        for row in read_journal(path).rows:
            by_key.setdefault(row.key, row)
    if not journals and (out / RESULTS).is_file():
        by_key = {row.key: row for row in from_parquet(out / RESULTS)}
    return sorted(by_key.values(), key=table_order)


def table_order(row: Row) -> tuple[Any, ...]:
    """The order of the table: by component, then probe and seed, then execution order."""
    return (
        row.component,
        row.attribute,
        row.prompt,
        row.subject,
        row.occurrence,
        row.seed,
        row.site_index,
        row.tokens or (),
        row.selector,
        row.window_start,
        row.metric,
        row.key,
    )


def merge(out: Path | str) -> Path:
    """Write `results.parquet` anew from every shard's ledger; whole or not at all."""
    out = Path(out)
    manifest = require(out)
    about = {"fasttrace.fixed": json.dumps(manifest.fixed, sort_keys=True)}
    with _ledger(out):  # else a shard that read earlier could overwrite one that read more
        write_atomic(out / RESULTS, to_parquet(read_rows(out), about))
    return out / RESULTS


def _stem(shard: Shard) -> str:
    return f"shard-{shard.index}-of-{shard.count}"


def _journals(out: Path) -> list[Path]:
    return sorted((out / "rows").glob("*.jsonl"))


def _ledger(out: Path) -> AbstractContextManager[None]:
    return lock(
        out / f"{OURS}.lock",
        _LEDGER_WAIT,
        f"another process has held the ledger of {out} for {_LEDGER_WAIT:.0f} seconds. Wait until "
        "it has ended and run the same command again.",
    )
