"""Judging from the command line: stopped anywhere it goes on; its page says how to repeat it."""

from __future__ import annotations

import errno
import html
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fasttrace.cli import main
from fasttrace.cli.judging import lines
from fasttrace.report.judged import Figure, judge
from fasttrace.store.evaluation import LEDGER
from fasttrace.store.judgements import read_judgements
from fasttrace.types import Judgement

ROOT = Path(__file__).parents[2]
COMMAND = "import sys; from fasttrace.cli import main; sys.exit(main())"
PROBES = {
    "schema": 1,
    "probes": [
        {"prompt": "a photo of a dog in the house", "subject": "dog", "attribute": "object"},
        {"prompt": "a red car", "subject": "car", "attribute": "object"},
        {"prompt": "a house like a painting", "subject": "painting", "attribute": "style"},
    ],
}


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("some probes") / "probes.json"
    path.write_text(json.dumps(PROBES))
    return path


@pytest.fixture
def edit(folders: dict[str, Path], tmp_path: Path) -> Path:
    out = tmp_path / "no dogs"
    assert main(["edit", str(folders["sd"]), "--pair", "dog=cat", "--out", str(out), "-q"]) == 0
    return out


def arguments(folders: dict[str, Path], edit: Path, probes: Path, *more: str) -> list[str]:
    return ["evaluate", str(edit), "--model", str(folders["sd"]), "--probes", str(probes),
            "--steps", "2",
            "--metric", f"clip:{folders['clip']}", *more]  # fmt: skip


def start(words: list[str]) -> subprocess.Popen[str]:
    threads = str(torch.get_num_threads())  # they decide how sums are rounded
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads},
    )  # fmt: skip


def judged(out: Path) -> int:
    """Lines of the ledger, without the question."""
    ledger = out / LEDGER
    return max(0, ledger.read_bytes().count(b"\n") - 1) if ledger.exists() else 0


def repeated(page: Path) -> list[str]:
    """The command that a page says it comes from."""
    text = page.read_text()
    found = text[text.index('<h2 id="repeat">') :]
    [command] = re.findall(r"<pre>(fasttrace (?:evaluate|locate).*?)</pre>", found, re.S)
    words = shlex.split(html.unescape(command))
    assert words[0] == "fasttrace"
    return words[1:]


def test_killed_and_resumed_it_is_as_if_nothing_had_been(folders, edit, probes, tmp_path, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    given = arguments(folders, edit, probes, "--seeds", "0:9")
    assert main([*given, "--out", str(whole), "-q"]) == 0
    kills = 0
    for more in (1, judged(whole) // 2):
        process = start([*given, "--out", str(out)])
        before, deadline = judged(out), time.monotonic() + 120
        while judged(out) < before + more and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        kills += process.poll() is None
        process.kill()
        process.communicate()
    assert kills == 2, "the kills should fall inside"
    there = judged(out)
    assert 0 < there < judged(whole)
    capsys.readouterr()
    assert main([*given, "--out", str(out)]) == 0
    said = re.search(
        r"going on, (\d+) judged already; (\d+) of (\d+) pictures left", capsys.readouterr().err
    )
    assert said is not None
    assert int(said[1]) == there
    assert 0 < int(said[2]) < int(said[3])
    assert int(said[2]) <= 2 * (judged(whole) - there) + 96  # at most a batch again
    assert read_judgements(out) == read_judgements(whole)
    # The page but for its own folder.
    pages = [(o / "report.html").read_text().replace(str(o), "OUT") for o in (out, whole)]
    assert pages[0].replace(" -q", "") == pages[1].replace(" -q", "")
    for picture in (whole / "pictures").iterdir():
        assert (out / "pictures" / picture.name).read_bytes() == picture.read_bytes()
    assert len(list((out / "pictures").iterdir())) == len(list((whole / "pictures").iterdir()))


def test_another_question_begins_anew_and_says_so(folders, edit, probes, capsys):
    assert main(arguments(folders, edit, probes, "--seeds", "0", "-q")) == 0
    first = read_judgements(edit / "evaluation")
    capsys.readouterr()
    assert main(arguments(folders, edit, probes, "--seeds", "0")) == 0
    assert "judged already; 0 of " in capsys.readouterr().err
    assert main(arguments(folders, edit, probes, "--seeds", "3")) == 0
    err = capsys.readouterr().err
    assert "holds an evaluation of another question (seeds 0, now 3): judging anew." in err
    found = read_judgements(edit / "evaluation")
    assert {row.seed for row in found} == {3}
    assert len(found) == len(first)
    assert judged(edit / "evaluation") == len({(row.prompt, row.seed) for row in found})
    names = {f"{n}.png" for r in found for n in (r.picture_before, r.picture_after)}
    assert {file.name for file in (edit / "evaluation" / "pictures").iterdir()} == names
    main(arguments(folders, edit, probes, "--seeds", "0", "--guidance", "3.5"))
    err = capsys.readouterr().err
    assert "guidance 7.5, now 3.5" in err
    assert "seeds 3, now 0" in err


def test_the_page_holds_the_command_that_gives_it(folders, edit, probes, capsys):
    out = edit / "evaluation"
    assert main(arguments(folders, edit, probes, "-q")) == 0
    page = out / "report.html"
    command, before = repeated(page), page.read_bytes()
    given = dict(pairwise(command))
    assert given["evaluate"] == str(edit)
    assert given["--seeds"] == "0,1"  # the default, spelt out
    assert given["--steps"] == "2"
    assert given["--guidance"] == "7.5"
    assert given["--model"] == str(folders["sd"])
    shutil.rmtree(out)
    assert main(command) == 0
    # What it was called with now is what it says, and a second time nothing changes.
    assert repeated(page) == command
    assert page.read_bytes() == before


def test_the_page_of_locate_and_edit_holds_its_command(folders, probes, tmp_path: Path, capsys):
    out = tmp_path / "found it"
    assert main(["locate-and-edit", str(folders["sd"]), "--pair", "dog=cat", "--probes",
                 str(probes), "--steps", "2", "--metric", f"clip:{folders['clip']}",
                 "--out", str(out), "-q"]) == 0  # fmt: skip
    page = out / "evaluation" / "report.html"
    command, before = repeated(page), page.read_text()
    assert command[0] == "locate-and-edit"
    assert command[command.index("--out") + 1] == str(out)
    assert command[command.index("--seeds") + 1] == "0"
    assert (
        html.escape(f'load_edit("{out / "edit"}")', quote=True).replace("&quot;", "&#34;") in before
    )
    shutil.rmtree(out)
    assert main(command) == 0
    after = page.read_text()
    assert repeated(page) == command
    again = [re.sub(r"20\d\d-\d\d-\d\dT[\d:]+Z", "", text) for text in (before, after)]
    assert again[0] == again[1]


def test_a_full_disk_loses_no_judgement(folders, edit, probes, capsys, monkeypatch):
    given = arguments(folders, edit, probes, "--seeds", "0", "-q")
    real, left = os.write, [12]

    def full(handle: int, data: bytes) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, data)

    monkeypatch.setattr("fasttrace.store.disk.os.write", full)
    assert main(given) == 1
    monkeypatch.undo()
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "the disk is full: the evaluation's" in err
    assert "Every finished judgement is safe" in err
    assert "row" not in err
    assert judged(edit / "evaluation") > 0
    assert main(given) == 0


def test_a_full_disk_leaves_nothing_of_an_edit(folders, tmp_path: Path, capsys, monkeypatch):
    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fasttrace.edit.export.save_file", full)
    out = tmp_path / "e"
    assert main(["edit", str(folders["sd"]), "--pair", "dog=cat", "--out", str(out), "-q"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"the disk is full: the edit {out} could not be written" in err
    assert "Nothing of it was kept" in err
    assert "row" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_phrase_too_long_is_one_line_on_stderr(folders, tmp_path: Path):
    """transformers has a line of its own for it."""
    words = ["edit", str(folders["sd"]), "--pair", f"{'dog ' * 300}=cat", "--out",
             str(tmp_path / "e")]  # fmt: skip
    process = start(words)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err.count("\n") == 1, err
    assert "text window" in err
    assert "Token indices" not in err


def row(number: int, shown: str, seed: int = 0) -> Judgement:
    return Judgement(
        edit="e", role="edited", phrase="dog", attribute="object", prompt=f"a dog {number}",
        seed=seed, metric="clip_score", before=20.0, after=19.0, new_before=None, new_after=None,
        expected='{"object":"dog"}', shown_before='{"object":"dog"}',
        shown_after=json.dumps({"object": shown}), picture_before=None, picture_after=None,
    )  # fmt: skip


def test_a_line_counts_as_the_page_does_and_says_what():
    few = [row(i, "dog" if i else "cat", seed) for i in range(2) for seed in range(3)]
    assert lines(judge(few)) == ["e (dog): UA 50 % (n = 2 prompts, no interval)"]
    many = [row(i, "dog" if i % 2 else "cat") for i in range(8)]
    [found] = judge(many)
    assert isinstance(found.ua, Figure)
    assert lines([found]) == [f"e (dog): UA 50 % [{found.ua.low:.0f}, {found.ua.high:.0f}] %"]
