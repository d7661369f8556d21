"""The results table: what every column of `results.parquet` means, and Row <-> Arrow <-> JSON.

The columns are those of `fasttrace.types.Row`, in its order. The schema's version is in the file's
metadata under `fasttrace.schema`; a column is never given another meaning within one version.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fasttrace.errors import StoreError
from fasttrace.types import Row

SCHEMA_VERSION = 1
VERSION_KEY = b"fasttrace.schema"
FIELDS = tuple(f.name for f in fields(Row))

_TEXT, _INT, _REAL = pa.string(), pa.int32(), pa.float64()

# column -> (type, may be null, what it means). The order is Row's; a test holds the two together.
COLUMNS: dict[str, tuple[pa.DataType, bool, str]] = {
    "key": (_TEXT, False, "content hash of everything that determines the score; unique"),
    "model": (_TEXT, False, "what the model was loaded as: 'embedded', a folder's name, a hub id"),
    "fingerprint": (_TEXT, False, "sha256 over the model's configurations and weights"),
    "component": (_TEXT, False, "unet, text_encoder or text_encoder_2"),
    "attribute": (_TEXT, False, "what the subject is an instance of; empty where not given"),
    "prompt": (_TEXT, False, "the caption"),
    "subject": (_TEXT, False, "the words destroyed in the corrupt run"),
    "occurrence": (_INT, False, "which appearance of the subject in the prompt, from 0"),
    "negative_prompt": (_TEXT, False, "the unconditional branch's text"),
    "seed": (pa.int64(), False, "seed of the initial latent"),
    "site": (_TEXT, False, "the diffusers path of the module whose output is restored"),
    "site_index": (_INT, False, "the site's place in execution order within its component"),
    "kind": (_TEXT, False, "resnet, attn1, attn2, ff; in a text encoder attn, mlp, hidden"),
    "selector": (_TEXT, False, "which part of the site's output, in words"),
    "tokens": (pa.list_(_INT), True, "positions in the padded prompt; null is all of them"),
    "branch": (_TEXT, False, "the guidance branch that is patched: cond, uncond or both"),
    "window_start": (_INT, False, "first denoiser call patched, from 0"),
    "window_stop": (_INT, False, "the call after the last one patched"),
    "corruption": (_TEXT, False, "canonical JSON of the corruption with sigma resolved"),
    "sampling": (_TEXT, False, "canonical JSON of steps, guidance, size, eta and scheduler"),
    "metric": (_TEXT, False, "the metric's key; scores are in its unit"),
    "score": (_REAL, False, "score of the patched run"),
    "clean_score": (_REAL, False, "score of the clean run"),
    "corrupt_score": (_REAL, False, "score of the corrupt run"),
    "total_effect": (_REAL, False, "clean_score - corrupt_score; turned where lower is closer"),
    "effect": (_REAL, False, "score - corrupt_score, turned likewise; in a swap clean - score"),
    "normalised_effect": (_REAL, True, "effect / total_effect; null where that is 0"),
    "noise_floor": (_REAL, False, "largest score difference between copies of one corrupt run"),
    "engine": (_TEXT, False, "what ran it: reference, or a fast engine's name"),
    "status": (_TEXT, False, "'run', or why a listed site needed no run"),
    "picture": (_TEXT, True, "name under pictures/, without suffix; null where none was kept"),
    "versions": (_TEXT, False, "canonical JSON: fasttrace, torch, diffusers, transformers, python"),
}


def arrow_schema(metadata: Mapping[str, str] | None = None) -> pa.Schema:
    """The Arrow schema; every field carries its meaning under `description`."""
    columns = [
        pa.field(name, kind, nullable=nullable, metadata={"description": text})
        for name, (kind, nullable, text) in COLUMNS.items()
    ]
    about = {VERSION_KEY: str(SCHEMA_VERSION).encode()}
    about |= {key.encode(): value.encode() for key, value in (metadata or {}).items()}
    return pa.schema(columns, metadata=about)


def row_to_dict(row: Row) -> dict[str, Any]:
    """Plain JSON values, in the schema's order."""
    values = {name: getattr(row, name) for name in FIELDS}
    if values["tokens"] is not None:
        values["tokens"] = list(values["tokens"])
    return values


def row_from_dict(values: Mapping[str, Any]) -> Row:
    """The inverse of `row_to_dict`. Raises `StoreError` where columns are missing or unknown."""
    if values.keys() != set(FIELDS):
        missing = sorted(set(FIELDS) - values.keys())
        unknown = sorted(values.keys() - set(FIELDS))
        raise StoreError(
            f"a row has other columns than schema {SCHEMA_VERSION}: missing {missing}, unknown "
            f"{unknown}. It was written by another version of fasttrace; read it with that one."
        )
    tokens = values["tokens"]
    return Row(**{**values, "tokens": None if tokens is None else tuple(tokens)})


def rows_to_table(rows: Iterable[Row], metadata: Mapping[str, str] | None = None) -> pa.Table:
    """Rows as an Arrow table with the documented schema."""
    return pa.Table.from_pylist([row_to_dict(row) for row in rows], schema=arrow_schema(metadata))


def table_to_rows(table: pa.Table) -> list[Row]:
    """The inverse of `rows_to_table`. Raises `StoreError` on another schema version."""
    version = (table.schema.metadata or {}).get(VERSION_KEY, b"none").decode(errors="replace")
    if version != str(SCHEMA_VERSION):
        raise StoreError(
            f"the table's schema version is {version}; this fasttrace reads {SCHEMA_VERSION}. "
            "Read it with the version of fasttrace that wrote it."
        )
    return [row_from_dict(values) for values in table.to_pylist()]


def to_parquet(rows: Iterable[Row], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a Parquet file; equal rows in equal order give equal bytes."""
    sink = io.BytesIO()
    pq.write_table(rows_to_table(rows, metadata), sink, compression="zstd")
    return sink.getvalue()


def from_parquet(path: Path) -> list[Row]:
    """Rows of a Parquet file. Raises `StoreError` where it is damaged or of another schema."""
    try:
        # No threads: a worker of Arrow's that lets go of Python's bytes while the interpreter exits
        # aborts the process.
        file = pq.ParquetFile(io.BytesIO(path.read_bytes()), pre_buffer=False)
        table = file.read(use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StoreError(
            f"{path} can't be read as Parquet ({_first_line(error)}). If the directory it was made "
            "in still has its rows/ folder, `fasttrace report` on that directory writes it anew."
        ) from error
    return table_to_rows(table)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
