"""Row, the Arrow schema and the JSON form say the same."""

from __future__ import annotations

import subprocess
import sys
import typing
from dataclasses import fields, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fasttrace.errors import StoreError
from fasttrace.store.schema import (
    COLUMNS,
    SCHEMA_VERSION,
    arrow_schema,
    from_parquet,
    row_from_dict,
    row_to_dict,
    rows_to_table,
    table_to_rows,
    to_parquet,
)
from fasttrace.types import Row

PYTHON = {"string": str, "int32": int, "int64": int, "double": float}


def test_columns_are_the_fields_of_row_in_order():
    assert tuple(COLUMNS) == tuple(f.name for f in fields(Row))
    hints = typing.get_type_hints(Row)
    for name, (kind, nullable, meaning) in COLUMNS.items():
        if pa.types.is_list(kind):
            expected: object = tuple[int, ...]
        else:
            expected = PYTHON[str(kind)]
        assert hints[name] == (expected | None if nullable else expected), name
        assert meaning


def test_meaning_and_version_travel_in_the_file(fakes, tmp_path: Path):
    path = tmp_path / "results.parquet"
    path.write_bytes(to_parquet(fakes.fake_sweep(prompts=1), {"fasttrace.fixed": "{}"}))
    schema = pq.read_schema(path)
    assert schema.metadata[b"fasttrace.schema"] == str(SCHEMA_VERSION).encode()
    assert schema.metadata[b"fasttrace.fixed"] == b"{}"
    assert schema.field("score").metadata[b"description"] == b"score of the patched run"
    assert schema.names == list(COLUMNS)


def test_rows_survive_both_ways_exactly(fakes, tmp_path: Path):
    rows = list(fakes.fake_sweep(prompts=2))
    odd = 'a \u2028 \U0001f409 "quoted" <b>\n\tline'
    rows += [
        replace(rows[0], key="odd", prompt=odd, tokens=(), normalised_effect=None, picture=None),
        replace(rows[0], key="tiny", score=5e-324, effect=-0.1 - 0.2, seed=2**62),
    ]
    path = tmp_path / "results.parquet"
    path.write_bytes(to_parquet(rows))
    assert from_parquet(path) == rows
    assert [row_from_dict(row_to_dict(row)) for row in rows] == rows
    assert to_parquet(rows) == path.read_bytes()


def test_another_schema_version_is_refused(fakes):
    table = rows_to_table(fakes.fake_sweep(prompts=1))
    other = table.replace_schema_metadata({"fasttrace.schema": "99"})
    with pytest.raises(StoreError, match="version is 99; this fasttrace reads 1"):
        table_to_rows(other)


def test_unknown_columns_are_named(fakes):
    values = row_to_dict(next(fakes.fake_sweep()))
    values["colour_of_hat"] = values.pop("seed")
    with pytest.raises(StoreError, match=r"missing \['seed'\], unknown \['colour_of_hat'\]"):
        row_from_dict(values)


@pytest.mark.parametrize("content", [b"", b"PAR1 nonsense PAR1", b"\0" * 4096])
def test_a_damaged_parquet_is_a_sentence(content: bytes, tmp_path: Path):
    path = tmp_path / "results.parquet"
    path.write_bytes(content)
    with pytest.raises(StoreError, match="can't be read as Parquet.*fasttrace report"):
        from_parquet(path)


def test_a_parquet_cut_short_is_a_sentence(fakes, tmp_path: Path):
    path = tmp_path / "results.parquet"
    path.write_bytes(to_parquet(fakes.fake_sweep(prompts=1))[:-200])
    with pytest.raises(StoreError, match="can't be read as Parquet"):
        from_parquet(path)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_reading_starts_no_threads(fakes, tmp_path: Path):
    """One that still holds Python's bytes when the interpreter exits aborts the process."""
    path = tmp_path / "results.parquet"
    path.write_bytes(to_parquet(fakes.fake_sweep(prompts=1)))
    code = (
        "import os, sys; from pathlib import Path\n"
        "from fasttrace.store.schema import from_parquet\n"
        "count = lambda: len(os.listdir('/proc/self/task'))\n"
        "before = count(); from_parquet(Path(sys.argv[1])); print(count() - before)"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


def test_required_columns_are_not_nullable():
    schema = arrow_schema()
    assert not schema.field("score").nullable
    assert schema.field("normalised_effect").nullable


def test_the_documentation_lists_every_column():
    text = (Path(__file__).parents[2] / "docs" / "results.md").read_text()
    for field in arrow_schema():
        kind = f"{field.type}{', or null' if field.nullable else ''}"
        assert f"| `{field.name}` | {kind} | {field.metadata[b'description'].decode()} |" in text
    assert text.count("\n| `") == len(arrow_schema()) + 6  # and the six files
