"""An evaluation's folder: what was judged is kept, and another question leaves it behind."""

from __future__ import annotations

import errno
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fasttrace.errors import StoreError
from fasttrace.store.evaluation import LEDGER, PICTURES, Evaluation, differences
from fasttrace.store.judgements import read_judgements

HERE = Path(__file__).parent
OPEN = """
import sys
from pathlib import Path
from fasttrace.store.evaluation import Evaluation
Evaluation.open(Path(sys.argv[1]), {})
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(HERE))  # it imports its neighbours
    try:
        spec = importlib.util.spec_from_file_location(
            "fasttrace_evaluation_script", HERE / "evaluation_script.py"
        )
        assert spec is not None
        assert spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    finally:
        sys.path.remove(str(HERE))
    return found


def test_killed_at_every_disk_call(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, str(HERE / "evaluation_script.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50


def test_a_unit_is_kept_before_the_next_one_is_made(script, tmp_path: Path):
    first, second = script.UNITS[:2]
    evaluation = Evaluation.open(tmp_path, script.QUESTION)
    evaluation.add(first, {})
    text = (tmp_path / LEDGER).read_bytes()
    assert text.count(b"\n") == 2  # the question, and one unit
    evaluation.add(first, {})  # again: nothing
    evaluation.add([], {})
    assert (tmp_path / LEDGER).read_bytes() == text
    evaluation.add(second, {})
    assert evaluation.done == {("ink", "a dog 0", 7), ("ink", "a dog 1", 7)}
    evaluation.close()
    evaluation.close()


def test_another_question_begins_anew_and_names_what_differs(script, tmp_path: Path):
    assert len(script.judge(tmp_path)) == 4
    with Evaluation.open(tmp_path, script.QUESTION) as same:
        assert same.begun_anew == {}
        assert len(same.done) == 4
    with Evaluation.open(tmp_path, {**script.QUESTION, "steps": 5, "seeds": [1]}) as other:
        assert other.begun_anew == {"steps": (4, 5), "seeds": (None, [1])}
        assert not other.done
        assert not other.rows
    # The old table stays until the new one is whole.
    assert len(read_judgements(tmp_path)) == 8
    with Evaluation.open(tmp_path, script.QUESTION) as back:
        assert set(back.begun_anew) == {"steps", "seeds"}
        assert not back.done


def test_differences_by_name():
    assert differences({"a": 1, "b": 2}, {"b": 2, "c": 3}) == {"c": (None, 3), "a": (1, None)}
    assert differences({"a": [1]}, {"a": [1]}) == {}


def test_pictures_of_other_questions_go_when_it_is_whole(script, tmp_path: Path):
    folder = tmp_path / PICTURES
    folder.mkdir()
    stale, foreign = folder / f"{'f' * 24}.png", folder / "holiday.png"
    for file in (stale, foreign):
        file.write_bytes(b"a picture")
    with Evaluation.open(tmp_path, script.QUESTION) as evaluation:
        evaluation.add(script.UNITS[0], {})
        assert stale.exists()
        evaluation.finish(evaluation.rows)
    assert not stale.exists()
    assert foreign.exists()  # of a name that is none of ours


def test_a_torn_last_line_is_cut_off(script, tmp_path: Path):
    script.judge(tmp_path)
    ledger = tmp_path / LEDGER
    whole = ledger.read_bytes()
    ledger.write_bytes(whole[:-20])
    assert script.judge(tmp_path) == [("ink", "a dog 3", 7)]
    assert ledger.read_bytes() == whole


@pytest.mark.parametrize(("line", "words"), [(2, "line 2, is damaged"), (1, "line 1, is damaged")])
def test_a_damaged_line_is_never_guessed_at(script, tmp_path: Path, line: int, words: str):
    script.judge(tmp_path)
    lines = (tmp_path / LEDGER).read_bytes().splitlines(keepends=True)
    lines[line - 1] = lines[line - 1].replace(b"ink", b"oil", 1)
    (tmp_path / LEDGER).write_bytes(b"".join(lines))
    with pytest.raises(StoreError, match=words):
        script.judge(tmp_path)
    del lines[line - 1]  # as the sentence advises
    (tmp_path / LEDGER).write_bytes(b"".join(lines))
    if line == 1:
        with pytest.raises(StoreError, match="doesn't say what was asked.*Delete it"):
            script.judge(tmp_path)
        (tmp_path / LEDGER).unlink()
        assert len(script.judge(tmp_path)) == 4
    else:
        assert script.judge(tmp_path) == [("ink", "a dog 0", 7)]


def test_two_processes_do_not_judge_in_one_folder(script, tmp_path: Path):
    with Evaluation.open(tmp_path, script.QUESTION):
        done = subprocess.run(
            [sys.executable, "-c", OPEN, str(tmp_path)], capture_output=True, text=True
        )
        assert done.returncode == 1
        assert "another process is judging in" in done.stderr
    assert len(script.judge(tmp_path)) == 4  # free again


def test_a_full_disk_says_what_was_being_written(
    script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = os.write
    left = [6]

    def full(handle: int, data: Any) -> int:
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, data)

    monkeypatch.setattr("fasttrace.store.disk.os.write", full)
    with pytest.raises(StoreError) as caught:
        script.judge(tmp_path)
    monkeypatch.undo()
    said = str(caught.value)
    assert "the disk is full: the evaluation's" in said
    assert "Every finished judgement is safe" in said
    assert "row" not in said.replace(str(tmp_path), "")
    assert 0 < len(script.judge(tmp_path)) < 4


def test_a_folder_that_is_a_file(script, tmp_path: Path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(StoreError, match="the evaluation's .*can't be used"):
        script.judge(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"
