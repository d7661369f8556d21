"""`fasttrace profile`, from the command line to the files, and what it refuses."""

import json
import os
import sys

import pytest

from fasttrace.cli import main

PROMPT = ["--prompt", "a photo of a dog"]
QUICK = [*PROMPT, "--steps", "1", "--metric", "latent_recovery", "--sites", "attn2"]


def test_end_to_end(folders, tmp_path, capsys):
    out = tmp_path / "made" / "profile"
    assert main(["profile", str(folders["sd"]), *QUICK, "--out", str(out), "--top", "2"]) == 0
    printed, errors = capsys.readouterr()
    assert sorted(path.name for path in out.iterdir()) == ["profile.html", "trace.json"]
    page = (out / "profile.html").read_text(encoding="utf-8")
    assert page.startswith("\n<!doctype html>") or page.lstrip().startswith("<!doctype html>")
    assert json.loads((out / "trace.json").read_text())["otherData"]["prompt"] == PROMPT[1]
    for words in ("cross-attention", "the 2 slowest of", "lanes a second", "bit for bit", str(out)):
        assert words in printed
    assert "running it twice with a clock" in errors


def test_json_alone_on_stdout(folders, capsys):
    arguments = ["profile", str(folders["sd"]), *QUICK, "--json", "--component", "text_encoder"]
    arguments[arguments.index("attn2")] = "paper"
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["costs"]["same"] is True
    assert found["out"] is None
    assert sum(line["share"] for line in found["kinds"]) == pytest.approx(1)


def test_a_variant(folders, loaded, tmp_path, capsys):
    """Weights under another name are found by it, and by it alone; so with `trace`."""
    loaded("sd").save_pretrained(tmp_path / "model", variant="fp16")
    model, out = str(tmp_path / "model"), str(tmp_path / "rows")
    assert main(["profile", model, *QUICK, "--variant", "fp16", "--quiet"]) == 0
    trace = ["trace", model, "--out", out, *QUICK, "--subject", "dog", "--quiet"]
    assert main([*trace, "--variant", "fp16"]) == 0
    capsys.readouterr()
    for arguments in (["profile", model, *QUICK], trace):
        assert main(arguments) == 1
        assert "'model' is damaged or incomplete" in capsys.readouterr().err


def test_ranges_alone(folders, capsys, monkeypatch):
    from types import SimpleNamespace

    names = []
    fake = SimpleNamespace(push_range=names.append, pop_range=lambda: None)
    monkeypatch.setitem(sys.modules, "nvtx", fake)
    assert main(["profile", str(folders["sd"]), *QUICK, "--ranges"]) == 0
    assert "run" in names
    assert "inside the range 'run'" in capsys.readouterr().out


def refusal(capsys, *arguments) -> tuple[int, str]:
    code = main(["profile", *map(str, arguments)])
    printed, errors = capsys.readouterr()
    assert printed == ""
    assert "Traceback" not in errors
    assert "bug" not in errors
    assert errors.count("\n") == 1
    return code, errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "profile needs a caption to trace"),
        (["--prompt", "  "], "profile needs a caption to trace"),
        (["--prompt", "?!"], "holds no word that could be its subject"),
        ([*PROMPT, "--dtype", "float8"], "--dtype 'float8' is unknown"),
        ([*PROMPT, "--device", "mps"], "only cpu and cuda have a clock"),
        ([*PROMPT, "--top", "-1"], "--top -1"),
        ([*PROMPT, "--ranges", "--json"], "takes neither --out nor --json"),
        ([*PROMPT, "--component", "vae"], "--component 'vae' is unknown"),
        ([*PROMPT, "--component", "all"], "one component at a time"),
        ([*PROMPT, "--lanes", "1"], "at least 4 lanes"),
        ([*PROMPT, "--subject", "cat"], "cat"),
        ([*PROMPT, "--sites", "nothing"], "nothing"),
        ([*PROMPT, "--steps", "0"], "steps"),
        (["--prompt", "a dog \udcff"], "not valid UTF-8"),
    ],
)
def test_a_sentence_for_a_wrong_call(arguments, words, folders, tmp_path, capsys):
    """Exit code 2, and nothing is left behind."""
    out = [] if "--ranges" in arguments else ["--out", tmp_path / "out"]
    code, errors = refusal(capsys, folders["sd"], *arguments, *out)
    assert code == 2
    assert words in errors
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_model(tmp_path, capsys):
    code, errors = refusal(capsys, tmp_path / "nowhere", *PROMPT, "--out", tmp_path / "out")
    assert code in (1, 2)
    assert "nowhere" in errors
    assert list(tmp_path.iterdir()) == []


def test_no_range_to_be_had(folders, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr("torch.version.cuda", None)
    code, errors = refusal(capsys, folders["sd"], *QUICK, "--ranges")
    assert code == 2
    assert "pip install nvtx" in errors


@pytest.mark.parametrize("kind", ["file", "full folder", "dangling link"])
def test_what_is_there_is_left_alone(kind, folders, tmp_path, capsys):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "full folder":
        out.mkdir()
        (out / "mine").touch()
    else:
        out.symlink_to(tmp_path / "nowhere")
    code, errors = refusal(capsys, folders["sd"], *PROMPT, "--out", out)
    assert code == 2
    assert "exists already" in errors
    assert out.is_symlink() or out.exists()


def test_an_empty_folder_will_do(folders, tmp_path, capsys):
    """And stays where the work fails."""
    code, _ = refusal(capsys, tmp_path / "nowhere", *PROMPT, "--out", tmp_path)
    assert code in (1, 2)
    assert tmp_path.is_dir()


@pytest.mark.parametrize("place", ["file/below", "x" * 300])
def test_where_nothing_can_be_made(place, folders, tmp_path, capsys):
    (tmp_path / "file").touch()
    code, errors = refusal(capsys, folders["sd"], *PROMPT, "--out", tmp_path / place)
    assert code == 1
    assert "can't be used" in errors
    assert "nothing of it was kept" in errors


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to(folders, tmp_path, capsys):
    tmp_path.chmod(0o500)
    code, errors = refusal(capsys, folders["sd"], *PROMPT, "--out", tmp_path)
    tmp_path.chmod(0o700)
    assert code == 1
    assert "can't be used" in errors


def test_a_hub_id_that_is_none(capsys):
    code, errors = refusal(capsys, "not/a/hub/id", *PROMPT)
    assert code in (1, 2)
    assert "not/a/hub/id" in errors
