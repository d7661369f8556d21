"""The table of an evaluation: written whole, read back, refused in a sentence."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fasttrace.errors import StoreError
from fasttrace.store.judgements import TABLE, read_judgements, write_judgements
from fasttrace.types import Judgement

ROW = Judgement(
    edit="ink", role="edited", phrase="ink", attribute="style", prompt="a dog in ink style",
    seed=2**40, metric="clip_score", before=24.25, after=19.1, new_before=None, new_after=17.5,
    expected='{"style":"ink"}', shown_before='{"style":"ink"}', shown_after='{"style":"flat"}',
    picture_before="abc", picture_after=None,
)  # fmt: skip


def change(folder: Path, **columns: Any) -> None:
    """Rewrite the table with other columns; None takes one away."""
    table = pq.read_table(folder / TABLE)
    about = table.schema.metadata
    for name, values in columns.items():
        table = table.drop_columns([name])
        if values is not None:
            table = table.append_column(name, values)
    pq.write_table(table.replace_schema_metadata(about), folder / TABLE)


def test_rows_come_back_as_they_were(tmp_path: Path):
    rows = [ROW, replace(ROW, prompt="日本 <script> \"'", seed=-1, new_before=1e-300), ROW]
    assert write_judgements(tmp_path, rows) == tmp_path / TABLE
    assert read_judgements(tmp_path) == rows
    write_judgements(tmp_path, [])
    assert read_judgements(tmp_path) == []
    assert os.listdir(tmp_path) == [TABLE]


def test_numbers_that_are_none_or_nan_stay_so(tmp_path: Path):
    write_judgements(tmp_path, [replace(ROW, after=float("nan"), new_after=None)])
    [found] = read_judgements(tmp_path)
    assert found.after != found.after
    assert found.new_after is None


def test_the_table_has_the_columns_of_a_judgement(tmp_path: Path):
    write_judgements(tmp_path, [ROW])
    schema = pq.read_schema(tmp_path / TABLE)
    assert schema.names == [f.name for f in fields(Judgement)]
    nullable = {f.name for f in schema if f.nullable}
    assert nullable == {"new_before", "new_after", "picture_before", "picture_after"}
    assert schema.field("seed").type == pa.int64()


def test_nothing_there_is_a_sentence(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StoreError, match="holds no evaluation; `fasttrace evaluate` makes one"):
            read_judgements(folder)


@pytest.mark.parametrize("keep", [0, 7, -40, -1])
def test_a_table_cut_short_is_a_sentence(tmp_path: Path, keep: int):
    path = write_judgements(tmp_path, [ROW] * 50)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StoreError, match=r"is damaged \(.+\). `fasttrace evaluate` makes it anew"):
        read_judgements(tmp_path)


def test_a_foreign_table_is_no_evaluation(tmp_path: Path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / TABLE)
    with pytest.raises(StoreError, match="was not written by fasttrace"):
        read_judgements(tmp_path)


def test_a_table_of_another_version_names_it(tmp_path: Path):
    write_judgements(tmp_path, [ROW])
    table = pq.read_table(tmp_path / TABLE)
    newer = table.replace_schema_metadata({"fasttrace.judgements": "2"})
    pq.write_table(newer, tmp_path / TABLE)
    with pytest.raises(StoreError, match="of version 2; this fasttrace reads 1"):
        read_judgements(tmp_path)


@pytest.mark.parametrize(
    "columns",
    [
        {"role": None},
        {"before": pa.array([None], pa.float64())},
        {"prompt": pa.array([None], pa.string())},
        {"seed": pa.array(["zero"])},
        {"expected": pa.array(["{"])},
        {"expected": pa.array(["[]"])},
        {"shown_after": pa.array(['{"style": 3}'])},
        {"shown_after": pa.array(["{}"])},  # less than what was expected
    ],
)
def test_columns_that_are_not_a_judgements_are_a_sentence(tmp_path: Path, columns: dict[str, Any]):
    write_judgements(tmp_path, [ROW])
    change(tmp_path)
    assert read_judgements(tmp_path) == [ROW]
    change(tmp_path, **columns)
    with pytest.raises(StoreError, match="is damaged"):
        read_judgements(tmp_path)


def test_a_folder_that_takes_no_file_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_judgements(tmp_path, [ROW])

    def refuse(*_args: Any) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("fasttrace.store.disk.os.open", refuse)
    with pytest.raises(StoreError, match=r"can't be used \(Read-only file system\)"):
        write_judgements(tmp_path, [])
    monkeypatch.undo()
    assert read_judgements(tmp_path) == [ROW]
    with pytest.raises(StoreError, match="can't be used"):
        write_judgements(tmp_path / "nowhere", [ROW])


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_reading_starts_no_threads(tmp_path: Path):
    """One that still holds Python's bytes when the interpreter exits aborts the process."""
    write_judgements(tmp_path, [ROW])
    code = (
        "import os, sys; from pathlib import Path\n"
        "from fasttrace.store.judgements import read_judgements\n"
        "count = lambda: len(os.listdir('/proc/self/task'))\n"
        "before = count(); read_judgements(Path(sys.argv[1])); print(count() - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
