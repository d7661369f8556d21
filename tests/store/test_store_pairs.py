"""Pair files: what is wrong, and where; as of probe files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fasttrace.errors import UsageError
from fasttrace.store.pairs import read_pairs

DOG = {"old": "dog", "new": "cat"}


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_reads_pairs_also_behind_a_byte_order_mark(tmp_path: Path):
    file = write(tmp_path / "p.json", {"schema": 1, "pairs": [DOG, {**DOG, "strength": 0.5}]})
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert [(p.old, p.new, p.strength) for p in read_pairs(file)] == [
        ("dog", "cat", 1.0), ("dog", "cat", 0.5),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "the pairs file .* is malformed: the file: "),
        ({"pairs": [DOG]}, "malformed: schema: field required"),
        ({"schema": 1, "pairs": []}, "malformed: pairs: .*at least 1"),
        ({"schema": 1, "pairs": [DOG, {"old": "x"}]}, "entry 2, new: field required"),
        ({"schema": 1, "pairs": [{**DOG, "olf": 1}]}, "entry 1, olf: extra inputs"),
        ({"schema": 1, "pairs": [{"old": 1, "new": "x"}, {}]}, r"entry 1, old: .*\(2 more like it"),
    ],
)
def test_malformed_files_name_the_place(content: object, sentence: str, tmp_path: Path):
    with pytest.raises(UsageError, match=sentence) as caught:
        read_pairs(write(tmp_path / "p.json", content))
    assert '{"old": "van gogh", "new": "painting"}' in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(UsageError, match=r"the pairs file .* can't be read"):
        read_pairs(tmp_path / "missing.json")
