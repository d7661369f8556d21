"""The table of an evaluation: Judgement <-> Parquet, with its pictures beside it."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fasttrace.errors import StoreError
from fasttrace.store.disk import JUDGEMENTS, read_errors, write_atomic
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
    pq.write_table(table, sink, compression="zstd")
    path = folder / TABLE
    write_atomic(path, sink.getvalue(), JUDGEMENTS)
    return path


def read_judgements(folder: Path) -> list[Judgement]:
    """Raises `StoreError` where there are none, or they are damaged or of another version."""
    path = folder / TABLE
    with read_errors(path):
        if not path.is_file():
            raise StoreError(f"{folder} holds no evaluation; `fasttrace evaluate` makes one.")
        data = path.read_bytes()
    try:
        # No threads, for the reason that `from_parquet` gives.
        table = pq.ParquetFile(io.BytesIO(data), pre_buffer=False).read(use_threads=False)
        version = (table.schema.metadata or {}).get(VERSION_KEY)
        if version == VERSION:
            rows = table.select(_SCHEMA.names).cast(_SCHEMA).to_pylist()
            return [_checked(Judgement(**row)) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise StoreError(
            f"{path} is damaged ({reason[:120]}). `fasttrace evaluate` makes it anew."
        ) from error
    if version is None:
        raise StoreError(f"{path} holds no evaluation: it was not written by fasttrace.")
    raise StoreError(
        f"{path} is an evaluation of version {version.decode(errors='replace')[:20]}; this "
        f"fasttrace reads {VERSION.decode()}. Read it with the version that wrote it."
    )


def _checked(row: Judgement) -> Judgement:
    """Raises `ValueError` where its JSON can't be what a classifier said."""
    expected, *shown = (json.loads(t) for t in (row.expected, row.shown_before, row.shown_after))
    for found in (expected, *shown):
        if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
            raise ValueError(f"classes are {found!r}")
    if not all(expected.keys() <= each.keys() for each in shown):
        raise ValueError(f"a picture was not judged for all of {', '.join(expected)}")
    return row
