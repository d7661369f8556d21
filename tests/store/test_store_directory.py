"""What a directory accepts and what it refuses, in words."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from fasttrace.errors import StoreError, UsageError
from fasttrace.store import Manifest, Shard, Store, merge, read_rows, require
from fasttrace.store.pictures import open_picture, picture_path

FIXED = {"fingerprint": "a" * 64, "steps": 10, "guidance": 7.5, "window": [0, 10], "metric": None}


@pytest.fixture
def rows(fakes):
    return list(fakes.fake_sweep(attributes=("object",), prompts=1, components=("unet",)))[:6]


def fill(out: Path, rows, call, **options) -> Path:
    with Store.open(out, fixed=options.pop("fixed", FIXED), call=call, **options) as store:
        for row in rows:
            store.add(row)
        return store.finish()


def test_created_filled_and_extended(rows, call, tmp_path: Path, fakes):
    out = tmp_path / "deep" / "out"
    fill(out, rows[:3], call)
    with Store.open(out, fixed=FIXED, call=call) as store:
        assert len(store) == 3
        assert [store.done(row.key) for row in rows] == [True] * 3 + [False] * 3
        assert not store.add(rows[0])
        assert store.add(rows[3], fakes.fake_pictures(rows[3]))
        store.finish()
    assert read_rows(out) == rows[:4]
    assert open_picture(out / "pictures", rows[3].picture, {}).size == (64, 64)
    assert len(require(out).calls) == 2
    assert not [p.name for p in out.rglob("*.tmp")]


def test_another_value_is_refused_and_named(rows, call, tmp_path: Path):
    fill(tmp_path, rows, call)
    before = (tmp_path / "fasttrace.json").read_bytes()
    with pytest.raises(
        StoreError,
        match="made with steps=10, guidance=7.5; this call asks for steps=20, guidance=1.0.*--out",
    ):
        fill(tmp_path, rows, call, fixed={**FIXED, "steps": 20, "guidance": 1.0})
    with pytest.raises(StoreError, match=r"made with eta=\(none\); this call asks for eta=0.5"):
        fill(tmp_path, rows, call, fixed={**FIXED, "eta": 0.5})
    assert (tmp_path / "fasttrace.json").read_bytes() == before


@pytest.mark.parametrize("first", ["python", "shell"])
def test_results_from_python_and_the_shell_do_not_mix(rows, call, tmp_path: Path, first):
    fixed = {"python": {"saved_from": "python", "engine": ["fast"]}, "shell": FIXED}
    fill(tmp_path, rows, call, fixed=fixed.pop(first))
    with pytest.raises(StoreError, match=r"holds results .*: choose another directory") as caught:
        fill(tmp_path, rows, call, fixed=fixed.popitem()[1])
    assert "saved_from" not in str(caught.value)


def test_resolved_values_are_those_of_the_first_call(rows, call, tmp_path: Path):
    fill(tmp_path, rows, call, resolved={"sigma": 0.25})
    fill(tmp_path, rows, call, resolved={"sigma": 0.75})
    assert Manifest.read(tmp_path).resolved == {"sigma": 0.25}


def test_a_directory_of_something_else_is_left_alone(rows, call, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match=r"belongs to something else: it holds thesis\.tex"):
        fill(tmp_path, rows, call)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_way_is_refused(rows, call, tmp_path: Path):
    (tmp_path / "out").write_text("")
    with pytest.raises(StoreError, match="is a file, not a directory"):
        fill(tmp_path / "out", rows, call)
    with pytest.raises(StoreError, match="can't be used"):
        fill(tmp_path / "out" / "below", rows, call)


def test_an_unwritable_directory_is_refused(rows, call, tmp_path: Path, monkeypatch):
    real = os.open

    def denied(path, flags, *args, **kwargs):
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(StoreError, match=r"can't be used \(Permission denied\).*--out"):
        fill(tmp_path / "out", rows, call)


@pytest.mark.parametrize("text", ["", "{", '{"format": "something"}', "[]", "\0\0"])
def test_a_damaged_manifest_is_a_sentence(text: str, rows, call, tmp_path: Path):
    fill(tmp_path, rows, call)
    (tmp_path / "fasttrace.json").write_text(text)
    with pytest.raises(StoreError, match="damaged or from another version.*untouched"):
        fill(tmp_path, rows, call)


def test_a_full_disk_while_a_picture_is_written_loses_nothing(
    rows, call, tmp_path: Path, monkeypatch, fakes
):
    with Store.open(tmp_path, fixed=FIXED, call=call) as store:
        store.add(rows[0], fakes.fake_pictures(rows[0]))
        with monkeypatch.context() as patch:

            def full(handle: int, data: object) -> int:
                raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr(os, "write", full)
            with pytest.raises(StoreError, match="the disk is full"):
                store.add(rows[1], fakes.fake_pictures(rows[1]))
            with pytest.raises(StoreError, match="the disk is full"):
                store.finish()
        assert not store.done(rows[1].key)
        assert not list(tmp_path.rglob("*.tmp"))
        store.add(rows[1], fakes.fake_pictures(rows[1]))
        store.finish()
    assert read_rows(tmp_path) == rows[:2]


def test_picture_names_never_leave_the_folder(rows, call, tmp_path: Path, fakes):
    picture = fakes.fake_picture(rows[0], 1.0)
    with Store.open(tmp_path / "out", fixed=FIXED, call=call) as store:
        for name in ("../evil", "a/b", "", ".hidden", "x" * 200, "a\0b"):
            with pytest.raises(StoreError, match="is no picture name"):
                store.add(replace(rows[0], picture=name), {name: picture})
        assert len(store) == 0
    with pytest.raises(StoreError):
        picture_path(tmp_path, "..")


def test_a_damaged_picture_is_left_out_with_a_sentence(tmp_path: Path):
    (tmp_path / "abc.png").write_bytes(b"\x89PNG not really")
    damaged: dict[str, str] = {}
    assert open_picture(tmp_path, "abc", damaged) is None
    assert "abc.png can't be read as a picture" in damaged["abc"]
    assert open_picture(tmp_path, "missing", damaged) is None
    assert list(damaged) == ["abc"]


def test_a_copied_table_without_its_ledger_can_be_read_and_extended(rows, call, tmp_path: Path):
    fill(tmp_path, rows[:4], call)
    for path in (tmp_path / "rows").glob("*.jsonl"):
        path.unlink()
    assert read_rows(tmp_path) == rows[:4]
    fill(tmp_path, rows, call)
    assert read_rows(tmp_path) == rows


def test_a_damaged_table_is_written_anew_from_the_ledger(rows, call, tmp_path: Path):
    fill(tmp_path, rows, call)
    good = (tmp_path / "results.parquet").read_bytes()
    (tmp_path / "results.parquet").write_bytes(b"nonsense")
    assert merge(tmp_path).read_bytes() == good


def test_no_results_is_a_sentence(tmp_path: Path):
    with pytest.raises(StoreError, match="holds no results.*fasttrace trace"):
        require(tmp_path)


@pytest.mark.parametrize(("index", "count"), [(2, 2), (-1, 2), (0, 0)])
def test_shards_that_do_not_exist(index: int, count: int):
    with pytest.raises(UsageError, match="0 <= i < n"):
        Shard(index, count)


def test_a_link_in_place_of_the_ledger_is_not_followed(rows, call, tmp_path: Path):
    fill(tmp_path / "out", rows, call)
    [ledger] = (tmp_path / "out" / "rows").glob("*.jsonl")
    other = tmp_path / "precious"
    other.write_text("no rows")
    ledger.unlink()
    ledger.symlink_to(other)
    with pytest.raises(StoreError, match=r"can't be used \(Too many levels of symbolic links\)"):
        fill(tmp_path / "out", rows, call)
    assert other.read_text() == "no rows"
