"""Editing from the command line: make, judge, locate, and what bad input gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fasttrace
from fasttrace.cli import main
from fasttrace.store.judgements import read_judgements

PROBES = {
    "schema": 1,
    "probes": [
        {"prompt": "a photo of a dog in the house", "subject": "dog", "attribute": "object"},
        {"prompt": "a red car", "subject": "car", "attribute": "object"},
        {
            "prompt": "a house in the style of a painting",
            "subject": "painting",
            "attribute": "style",
        },
    ],
}


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probes") / "probes.json"
    path.write_text(json.dumps(PROBES))
    return path


@pytest.fixture(scope="module")
def saved(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("edits") / "no-dogs"
    assert main(["edit", str(folders["sd"]), "--pair", "dog=cat", "--tokens", "last",
                 "--out", str(out), "-q"]) == 0  # fmt: skip
    return out


def sentence(capsys) -> str:
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


def test_an_edit_says_what_it_is_and_lies_in_its_folder(folders, tmp_path: Path, capsys):
    out = tmp_path / "e"
    assert main(["edit", str(folders["sd"]), "--pair", "dog=cat", "--out", str(out), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["sites"] == ["text_encoder.layers.0.self_attn"]
    assert about["out"] == str(out)
    assert set(about["discarded"]) == {"text_encoder.layers.0.self_attn.out_proj"}
    assert (out / "README.md").is_file()
    edit = fasttrace.load_edit(out)
    assert edit.manifest["pairs"][0]["new"] == ["cat"]


def test_pairs_come_from_a_file_too(folders, tmp_path: Path, capsys):
    file = tmp_path / "pairs.json"
    file.write_text(
        json.dumps(
            {"schema": 1, "pairs": [{"old": "dog", "new": ["cat", "car"], "weights": [3.0, 1.0]}]}
        )
    )
    out = tmp_path / "e"
    assert main(["edit", str(folders["sd"]), "--pairs", str(file), "--out", str(out), "-q"]) == 0
    assert fasttrace.load_edit(out).manifest["pairs"][0]["shares"] == [0.75, 0.25]


def test_an_edit_on_top_of_another(folders, saved: Path, tmp_path: Path):
    out = tmp_path / "both"
    assert main(["edit", str(folders["sd"]), "--pair", "car=house", "--after", str(saved),
                 "--out", str(out), "-q"]) == 0  # fmt: skip
    edit = fasttrace.load_edit(out)
    assert len(edit.manifest["after"]) == 1
    assert [(p["old"], p["new"]) for p in edit.pairs] == [("dog", ["cat"]), ("car", ["house"])]
    card = (out / "README.md").read_text()
    assert "| dog | cat |" in card
    assert "| car | house |" in card
    with edit.applied(fasttrace.load(str(folders["sd"]))):  # it fits the unedited model
        pass


def test_a_truncated_edit_says_so(folders, tmp_path: Path, capsys):
    out = tmp_path / "e"
    assert main(["edit", str(folders["sd"]), "--pair", "dog=cat", "--rank", "1", "--out",
                 str(out)]) == 0  # fmt: skip
    assert "Truncated: up to" in capsys.readouterr().out


def test_the_files_are_for_everybody(saved: Path):
    modes = {file.stat().st_mode & 0o777 for file in saved.iterdir() if file.is_file()}
    assert len(modes) == 1


def test_the_path_of_lambdas_is_drawn(folders, saved, probes, tmp_path: Path):
    out = tmp_path / "judged"
    assert main(["evaluate", str(saved), "--model", str(folders["sd"]), "--probes", str(probes),
                 "--seeds", "0", "--steps", "1", "--metric", f"clip:{folders['clip']}", "--path",
                 "--out", str(out), "-q"]) == 0  # fmt: skip
    edits = {row.edit for row in read_judgements(out / "path")}
    assert edits == {f"lam {lam:g}" for lam in (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)}
    assert "lambda" in (out / "report.html").read_text().lower()


def test_evaluate_writes_a_table_pictures_and_a_page(folders, saved, probes, capsys):
    assert main(["evaluate", str(saved), "--model", str(folders["sd"]), "--probes", str(probes),
                 "--seeds", "0:2", "--steps", "2", "--metric", f"clip:{folders['clip']}",
                 "--json", "-q"]) == 0  # fmt: skip
    about = json.loads(capsys.readouterr().out)
    rows = read_judgements(saved / "evaluation")
    assert {r.role for r in rows} == {"edited", "paraphrase", "misspelling", "neighbour", "other"}
    assert {r.seed for r in rows} == {0, 1}
    names = {n for r in rows for n in (r.picture_before, r.picture_after)}
    assert {p.stem for p in (saved / "evaluation" / "pictures").iterdir()} == names
    page = Path(about["report"]).read_text()
    assert "a photo of a cat" not in page.split("<body")[0]
    assert "a red car" in page
    assert about["edits"][0]["edit"] == "no-dogs"
    assert about["edits"][0]["ua"] is None  # no classifiers


def test_a_folder_of_several_edits_is_judged_at_once(folders, probes, tmp_path: Path, capsys):
    for name, pair in (("one", "dog=cat"), ("two", "car=house")):
        assert main(["edit", str(folders["sd"]), "--pair", pair, "--out",
                     str(tmp_path / "all" / name), "-q"]) == 0  # fmt: skip
    assert main(["evaluate", str(tmp_path / "all"), "--model", str(folders["sd"]), "--probes",
                 str(probes), "--seeds", "0", "--steps", "2", "--metric",
                 f"clip:{folders['clip']}", "-q"]) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "one (dog): " in out
    assert "two (car): " in out


def test_locate_and_edit_aims_where_the_trace_says(folders, probes, tmp_path: Path, capsys):
    out = tmp_path / "found"
    arguments = ["locate-and-edit", str(folders["sd"]), "--pair", "dog=cat", "--probes",
                 str(probes), "--steps", "2", "--metric", f"clip:{folders['clip']}",
                 "--out", str(out), "--json", "-q"]  # fmt: skip
    assert main(arguments) == 0
    about = json.loads(capsys.readouterr().out)
    from fasttrace.report.result import Result

    effects = Result.open(out / "before").aie(by="all")
    best = max(
        (e for e in effects if e.status == "run" and e.effect == e.effect), key=lambda e: e.effect
    )
    assert about["site"] == best.site
    edit = fasttrace.load_edit(out / "edit")
    assert edit.manifest["sites"] == [best.site]
    [effect] = about["effects"]
    assert effect["group"] == "object"
    assert effect["before"] == pytest.approx(best.effect)
    assert effect["after"] != pytest.approx(effect["before"], rel=0.01)
    # Again: nothing is made anew, the same answer.
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["effects"] == about["effects"]
    # Other settings would be another edit than the one that lies there.
    assert main([*arguments, "--lam", "7"]) == 1
    assert "another --out" in sentence(capsys)
    page = (out / "evaluation" / "report.html").read_bytes()
    assert main(["evaluate", str(out), "--model", str(folders["sd"]), "--probes", str(probes),
                 "--steps", "2", "--seeds", "0", "--metric", f"clip:{folders['clip']}",
                 "-q"]) == 0  # fmt: skip
    assert (out / "evaluation" / "report.html").read_bytes() == page
    assert (out / "edit" / "evaluation" / "report.html").is_file()
    capsys.readouterr()
    other = [a if a != "dog=cat" else "dog=house" for a in arguments]
    assert main(other) == 1
    assert "other phrases" in sentence(capsys)


def test_an_edit_of_another_model_is_refused(folders, saved, probes, capsys):
    assert main(["evaluate", str(saved), "--model", str(folders["sdxl"]), "--probes", str(probes),
                 "--metric", f"clip:{folders['clip']}", "--steps", "2", "-q",
                 "--out", str(saved.parent / "x")]) == 1  # fmt: skip
    assert "other weights" in sentence(capsys)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "give either --pair"),
        (["--pair", "dog"], "can't be read"),
        (["--pair", "dog=dog"], "itself"),
        (["--pair", "=cat"], "empty"),
        (["--pair", "dog="], "empty phrase"),
        (["--pair", "dog=cat", "--pair", "dog=car"], "give it once"),
        (["--pair", "dog=cat", "--lam", "nan"], "finite"),
        (["--pair", "dog=cat", "--method", "magic"], "no method"),
        (["--pair", "dog=cat", "--site", "resnet"], "kind 'resnet'"),
        (["--pair", "dog=cat", "--site", "nowhere"], "No site matches"),
        (["--pair", "dog=cat", "--template", "a photo"], "needs one {}"),
        (["--pair", "dog=cat", "--tokens", "some"], "expected one of"),
        (["--pair", "dog=cat", "--bias", "none"], "exact or as_released"),
        (["--pair", "dog=cat", "--method", "locoedit"], "--site"),
        (["--pair", "dog " * 40 + "=cat"], "text window"),
        (["--pair", "dog=cat", "--rank", "0"], "whole number"),
        (["--pair", "dog=cat", "--form", "ckpt"], "expected some of"),
        (["--pairs", "nowhere.json"], "can't be read"),
    ],
)
def test_a_wrong_call_is_one_sentence(folders, tmp_path: Path, capsys, given, said):
    out = tmp_path / "e"
    assert main(["edit", str(folders["sd"]), *given, "--out", str(out)]) == 2
    assert said in sentence(capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "the file"),
        ('{"schema": 1, "pairs": []}', "pairs"),
        ('{"schema": 1, "pairs": [{"old": "dog"}]}', "entry 1, new: field required"),
        ('{"schema": 1, "pairs": [{"old": "dog", "new": [1]}]}', "entry 1, new"),
        ('{"schema": 2, "pairs": [{"old": "dog", "new": "cat"}]}', "schema"),
        ('[["dog", "cat"]]', "the file"),
    ],
)
def test_a_malformed_pairs_file_is_one_sentence(folders, tmp_path: Path, capsys, text, said):
    file = tmp_path / "pairs.json"
    file.write_text(text)
    arguments = ["edit", str(folders["sd"]), "--pairs", str(file), "--out", str(tmp_path / "e")]
    assert main(arguments) == 2
    assert said in sentence(capsys)


def test_an_existing_folder_is_left_alone(folders, saved: Path, capsys):
    before = (saved / "edit.json").read_bytes()
    assert main(["edit", str(folders["sd"]), "--pair", "dog=car", "--out", str(saved)]) == 1
    assert "there already" in sentence(capsys)
    assert (saved / "edit.json").read_bytes() == before


def test_a_folder_without_an_edit_is_refused(tmp_path: Path, capsys):
    assert main(["evaluate", str(tmp_path)]) == 1
    assert "holds no edit" in sentence(capsys)


def test_the_demo_erases_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On the bundled model, one of its edits and few captions: the concept goes, others stay."""
    from fasttrace.cli import demo, judging
    from fasttrace.types import Probe

    probes = [
        Probe("a dog in flat style on a blue ground", "dog", "object"),
        Probe("a rocket in flat style on a yellow ground", "rocket", "object"),
        Probe("a car in ink style on a yellow ground", "ink", "style"),
    ]
    monkeypatch.setattr(demo, "EDITS", {"one-object": demo.EDITS["one-object"]})
    monkeypatch.setattr(judging, "default_probes", lambda model: probes)
    page, [judged] = demo.erase(tmp_path, quiet=True)
    assert page == tmp_path / "edits" / "report.html"
    assert page.is_file()
    assert judged.ua is not None
    assert judged.ira is not None
    assert judged.ua.value == judged.ira.value == 100
    assert judged.before["ua"] is not None
    assert judged.before["ua"].value == 0
    again = (tmp_path / "edits" / "one-object" / "edit.json").stat().st_mtime_ns
    demo.erase(tmp_path, quiet=True)
    assert (tmp_path / "edits" / "one-object" / "edit.json").stat().st_mtime_ns == again
