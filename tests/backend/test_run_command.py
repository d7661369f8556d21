"""`fasttrace run`: a plan file from the first row to the last, stopped and taken up again."""

import json

import pyarrow.parquet as pq
import pytest

import fasttrace
from fasttrace.cli import main
from fasttrace.store import read_rows


def run(plan, out, model, *options) -> int:
    return main(["run", str(plan), "--out", str(out), "--model", str(model), *options])


def test_rows_are_those_of_the_tracer(write_plan, folders, tmp_path, capsys):
    plan, out = write_plan(), tmp_path / "out"
    assert run(plan, out, folders["sd"], "--json", "--quiet") == 0
    outcome = json.loads(capsys.readouterr().out)
    rows = {row.key: row for row in read_rows(out)}
    tracer = fasttrace.Tracer(fasttrace.load(str(folders["sd"])))
    probe = fasttrace.Probe("a photo of a dog in the house", "dog")
    expected = tracer.trace(
        [probe], sites="attn2", seeds=2, steps=3, guidance=3.0, metric="latent_recovery"
    ).rows
    assert rows.keys() == {row.key for row in expected}
    assert all(rows[row.key].score == row.score for row in expected)
    assert outcome["rows"] == outcome["new"] == len(expected) > 0
    assert outcome["plan"] == fasttrace.read_plan(plan).digest()
    assert pq.read_table(out / "results.parquet").num_rows == len(expected)
    pictures = {row.picture for row in expected}
    assert pictures <= {path.stem for path in (out / "pictures").iterdir()}


def test_goes_on_and_extends(write_plan, folders, tmp_path, capsys):
    out, model = tmp_path / "out", folders["sd"]
    assert run(write_plan(seeds=[0]), out, model, "--json", "--quiet") == 0
    first = json.loads(capsys.readouterr().out)
    assert run(write_plan(seeds=[0, 1]), out, model, "--json", "--quiet") == 0
    second = json.loads(capsys.readouterr().out)
    assert second["new"] == first["new"] == first["rows"]
    assert run(write_plan(seeds=[0, 1]), out, model, "--json", "--quiet") == 0
    assert json.loads(capsys.readouterr().out)["new"] == 0
    assert run(write_plan(steps=4), out, model, "--quiet") == 1
    assert "steps=3" in capsys.readouterr().err


REFUSED = {
    "unknown key": ({"shell": "ls"}, "shell: Extra inputs"),
    "no such site": ({"sites": ["attn9"]}, "No site matches 'attn9'"),
    "window outside": ({"windows": [[0, 99]]}, "outside the run"),
    "subject": ({"probes": [{"prompt": "a dog", "subject": "cat"}]}, "cat"),
    "no such metric": ({"metrics": ["os.system"]}, "Unknown metric 'os.system'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, write_plan, folders, tmp_path, capsys):
    change, expected = REFUSED[name]
    out = tmp_path / "out"
    assert run(write_plan(**change), out, folders["sd"], "--quiet") == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1
    assert not out.exists()


def test_without_a_model(write_plan, tmp_path, capsys):
    assert main(["run", str(write_plan()), "--out", str(tmp_path / "out")]) == 2
    assert "names no model" in capsys.readouterr().err


def test_check_only(write_plan, tmp_path, capsys):
    plan = write_plan()
    for where in (["--out", str(tmp_path / "out")], []):
        assert main(["run", str(plan), *where, "--check"]) == 0
        assert capsys.readouterr().out.startswith(fasttrace.read_plan(plan).digest())
    assert not (tmp_path / "out").exists()
    assert main(["run", str(plan), "--model", "embedded"]) == 2
    assert "--out DIR" in capsys.readouterr().err
