"""The page of edits where the disk, or what lies on it, is in the way."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from fasttrace_edit_pages import evaluation, fill, page_of

from fasttrace.errors import StoreError
from fasttrace.store.judgements import write_judgements


def test_no_evaluation_a_damaged_and_an_empty_one_are_sentences(tmp_path: Path):
    with pytest.raises(StoreError, match="holds no evaluation"):
        page_of(tmp_path)
    (tmp_path / "judgements.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(StoreError, match="is damaged"):
        page_of(tmp_path)
    write_judgements(tmp_path, [])
    with pytest.raises(StoreError, match="without a single picture"):
        page_of(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_read_only_folder_is_a_sentence_and_keeps_the_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = fill(tmp_path, evaluation())
    old = page_of(folder)
    opened = os.open

    def refuse(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, flags, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("fasttrace.store.disk.os.open", refuse)
        with pytest.raises(
            StoreError, match=r"evaluation's .*report.html can't be used \(Read-only file system\)"
        ):
            page_of(folder)
    assert (folder / "report.html").read_text() == old
    assert not list(folder.glob(".fasttrace*"))
