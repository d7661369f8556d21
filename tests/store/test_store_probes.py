"""Probe files: what is wrong, and where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fasttrace.errors import UsageError
from fasttrace.store.probes import read_probes
from fasttrace.types import Probe

DOG = {"prompt": "a photo of a dog", "subject": "dog", "attribute": "object"}


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_reads_probes_with_their_seeds(tmp_path: Path):
    more = {**DOG, "prompt": "dog and dog", "occurrence": 1, "seeds": [3, 4]}
    entries = read_probes(write(tmp_path / "p.json", {"schema": 1, "probes": [DOG, more]}))
    assert entries[0].probe() == Probe("a photo of a dog", "dog", "object")
    assert entries[0].seeds is None
    assert entries[1].probe() == Probe("dog and dog", "dog", "object", occurrence=1)
    assert entries[1].seeds == [3, 4]


def test_a_byte_order_mark_is_no_content(tmp_path: Path):
    file = write(tmp_path / "p.json", {"schema": 1, "probes": [DOG]})
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(read_probes(file)) == 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "malformed: the file: .*json"),
        ("{", "malformed: the file: .*json"),
        ([], "malformed: the file: "),
        ({"probes": [DOG]}, "malformed: schema: field required"),
        ({"schema": 2, "probes": [DOG]}, "malformed: schema: input should be 1"),
        ({"schema": 1, "probes": []}, "malformed: probes: .*at least 1"),
        ({"schema": 1, "probes": [DOG, {"prompt": "x"}]}, "entry 2, subject: field required"),
        ({"schema": 1, "probes": [{**DOG, "subject": " "}]}, "entry 1, subject: .*at least 1"),
        ({"schema": 1, "probes": [{**DOG, "subjct": 1}]}, "entry 1, subjct: extra inputs"),
        ({"schema": 1, "probes": [{**DOG, "seeds": [-1]}]}, "entry 1, seeds.0: .*or equal to 0"),
        ({"schema": 1, "probes": [{**DOG, "seeds": ["1"]}]}, "entry 1, seeds.0: .*valid integer"),
        ({"schema": 1, "probes": [{**DOG, "seeds": []}]}, "entry 1, seeds: .*at least 1"),
        ({"schema": 1, "probes": [DOG, DOG]}, "one probe twice: entries 1 and 2"),
        ('{"schema": 1, "probes": [{"prompt": "\\ud800", "subject": "x"}]}', "malformed"),
    ],
)
def test_malformed_files_name_the_place(content: object, sentence: str, tmp_path: Path):
    with pytest.raises(UsageError, match=sentence):
        read_probes(write(tmp_path / "p.json", content))


def test_unreadable_files(tmp_path: Path):
    with pytest.raises(UsageError, match="can't be read"):
        read_probes(tmp_path / "missing.json")
    with pytest.raises(UsageError, match="can't be read"):
        read_probes(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"schema": 1, "probes": [{"prompt": "caf\xe9"}]}')
    with pytest.raises(UsageError, match="malformed"):
        read_probes(tmp_path / "latin.json")
