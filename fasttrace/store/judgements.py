"""The table of an evaluation: Judgement <-> Parquet, with its pictures beside it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fasttrace.errors import StoreError
from fasttrace.store.disk import disk_errors, write_atomic
from fasttrace.types import Judgement

TABLE = "judgements.parquet"
VERSION_KEY, VERSION = b"fasttrace.judgements", b"1"
_TYPES = {"int": pa.int64(), "float": pa.float64(), "float | None": pa.float64()}
_FIELDS = fields(Judgement)
_SCHEMA = pa.schema(
    [
        pa.field(f.name, _TYPES.get(str(f.type), pa.string()), nullable="None" in str(f.type))
        for f in _FIELDS
    ],
    metadata={VERSION_KEY: VERSION},
)


def write_judgements(folder: Path, rows: Sequence[Judgement]) -> Path:
    """Write `judgements.parquet`, whole or not at all. Raises `StoreError`."""
    table = pa.Table.from_pylist([asdict(row) for row in rows], schema=_SCHEMA)
    sink = io.BytesIO()
    pq.write_table(table, sink)
    path = folder / TABLE
    write_atomic(path, sink.getvalue())
    return path


def read_judgements(folder: Path) -> list[Judgement]:
    """Raises `StoreError` where there are none or they are damaged."""
    path = folder / TABLE
    with disk_errors(path):
        if not path.is_file():
            raise StoreError(f"{folder} holds no evaluation; `fasttrace evaluate` makes one.")
    try:
        table = pq.read_table(path)
        if (table.schema.metadata or {}).get(VERSION_KEY) != VERSION:
            raise ValueError("it is of another version of fasttrace")
        names = [f.name for f in _FIELDS]
        rows: list[dict[str, Any]] = table.select(names).to_pylist()
        return [Judgement(**row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise StoreError(f"{path} is damaged ({reason[:120]}).") from error
