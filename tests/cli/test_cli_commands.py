"""What each command prints, refuses and returns; with a tracer that needs no model."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import fasttrace
from fasttrace.cli import main
from fasttrace.errors import ModelError
from fasttrace.store import Call, Manifest, Store, read_rows

DOG = ["--prompt", "a photo of a dog", "--subject", "dog"]


@pytest.fixture
def trace(fake_tracer, tmp_path, capsys):
    """Run `fasttrace trace fake ...`; exit code, stdout, stderr."""

    def run(*arguments: object, out: Path = tmp_path / "out") -> tuple[int, str, str]:
        code = main(["trace", "fake", "--out", str(out), *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_traces_and_says_where(trace, tmp_path: Path):
    code, out, err = trace(*DOG, "--seeds", "0:3", "--component", "all")
    assert code == 0
    assert out == f"Look at it: fasttrace report {tmp_path / 'out'}\n"
    assert "24 rows (unet 12, text_encoder 12), 4 denoiser calls a run" in err
    assert "unet: 12 patched runs in 1 batches of up to 48 lanes" in err
    assert "1.0 % above the least" in err
    assert "24/24 rows" in err
    assert len(read_rows(tmp_path / "out")) == 24
    assert len(list((tmp_path / "out" / "pictures").glob("*.png"))) > 3
    command = Manifest.read(tmp_path / "out").calls[0].command
    assert command.startswith("fasttrace trace fake --out")
    assert "'a photo of a dog'" in command


def test_json_is_alone_on_stdout_and_quiet_is_quiet(trace, tmp_path: Path):
    code, out, err = trace(*DOG, "--json", "-q", "--no-pictures")
    assert (code, err) == (0, "")
    about = json.loads(out)
    assert (about["rows"], about["new"], about["planned"]) == (4, 4, 4)
    assert Path(about["results"]).is_file()
    assert not list((tmp_path / "out" / "pictures").iterdir())


def test_the_same_command_again_does_nothing_more(trace):
    trace(*DOG)
    _, out, err = trace(*DOG, "--json")
    assert json.loads(out)["new"] == 0
    assert "4 need no work here" in err


def test_more_prompts_seeds_and_components_extend(trace, tmp_path: Path, fake_tracer):
    """Sigma stays that of the first call, though it depends on the probes."""
    probes = tmp_path / "probes.json"
    entries = [{"prompt": "a dog", "subject": "dog"}, {"prompt": "a cat", "subject": "cat"}]
    probes.write_text(json.dumps({"schema": 1, "probes": entries}))
    trace("--probes", probes)
    assert fake_tracer.calls[0]["corruption"].sigma is None
    code, out, _ = trace(*DOG, "--seeds", "0:2", "--component", "all", "--json")
    assert code == 0
    assert json.loads(out)["rows"] == 8 + 16
    assert [c["corruption"].sigma for c in fake_tracer.calls] == [0.2, 0.2]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--steps", "20"], "made with steps=50; this call asks for steps=20"),
        (
            ["--sigma", "0.5"],
            r"noise-scale=3.0, sigma=\(none\); .* noise-scale=\(none\), sigma=0.5",
        ),
        (["--noise-scale", "2"], "noise-scale=3.0; this call asks for noise-scale=2.0"),
        (["--noise-seed", "1"], "noise-seed=0; this call asks for noise-seed=1"),
        (["--branch", "both"], "branch=cond; this call asks for branch=both"),
        (["--window", "0:2"], r"window=\(none\); this call asks for window=\[\[0, 2\]\]"),
        (["--metric", "attribute"], "metric=.*clip_score.*; this call asks for metric=.*attribute"),
        (["--corruption", "replace", "--replacement", "cat"], "corruption=embedding_noise, "),
    ],
)
def test_another_value_is_refused_by_its_name(trace, change, named):
    trace(*DOG)
    code, out, err = trace(*DOG, *change)
    assert (code, out) == (1, "")
    import re

    assert re.search(named, err), err
    assert "choose another --out" in err


def test_shards_together_equal_the_whole(trace, tmp_path: Path, capsys):
    for i in range(3):
        assert trace(*DOG, "--seeds", "0:5", "--shard", f"{i}/3")[0] == 0
    trace(*DOG, "--seeds", "0:5", out=tmp_path / "whole")
    main(["report", str(tmp_path / "out"), "-q"])
    parts = [(tmp_path / d / "results.parquet").read_bytes() for d in ("out", "whole")]
    assert parts[0] == parts[1]
    counts = [len(p.read_text().splitlines()) for p in (tmp_path / "out/rows").glob("*.jsonl")]
    assert sorted(counts) == [4, 8, 8]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give either --prompt with --subject, or --probes FILE"),
        (["--prompt", "a dog"], "--prompt needs --subject"),
        ([*DOG, "--probes", "p.json"], "give either --prompt"),
        (["--probes", "missing.json"], "missing.json can't be read"),
        (["--probes", "p.json", "--subject", "dog"], "--subject belongs to --prompt"),
        (["--probes", "p.json", "--attribute", "style"], "--attribute belongs to --prompt"),
        (["--probes", "p.json", "--occurrence", "1"], "--occurrence belongs to --prompt"),
        ([*DOG, "--component", ""], "--component is empty"),
        ([*DOG, "--metric", ","], "--metric is empty"),
        ([*DOG, "--seeds", "4:0"], "--seeds '4:0' can't be read"),
        ([*DOG, "--shard", "2/2"], "shard 2/2 does not exist"),
        ([*DOG, "--shard", "two"], "--shard 'two' can't be read"),
        ([*DOG, "--corruption", "magic"], "'magic' is unknown: expected embedding_noise"),
        ([*DOG, "--dtype", "int8"], "'int8' is unknown: expected float32"),
        ([*DOG, "--component", "vae"], "'vae' is unknown"),
        ([*DOG, "--window", "x"], "--window 'x' can't be read"),
        ([*DOG, "--steps", "many"], "Invalid value for '--steps'"),
        ([*DOG, "--no-such-option"], "No such option"),
    ],
)
def test_wrong_calls_are_a_sentence_and_2(trace, arguments, sentence, tmp_path: Path):
    code, out, err = trace(*arguments)
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.startswith("fasttrace: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_foreign_directory_is_refused_before_a_model_is_loaded(trace, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "photo.jpg").touch()
    monkeypatch.setattr(fasttrace, "load", lambda *a, **k: pytest.fail("loaded"), raising=False)
    code, _, err = trace(*DOG)
    assert code == 1
    assert "belongs to something else: it holds photo.jpg" in err


def test_a_model_that_cannot_be_loaded(trace, monkeypatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise ModelError("There is no model 'fake'.")

    monkeypatch.setattr(fasttrace, "load", fail, raising=False)
    assert trace(*DOG) == (1, "", "fasttrace: There is no model 'fake'.\n")


def stop_at(fake_tracer, number: int, error: BaseException):
    def before_row(row: int) -> None:
        if row == number:
            raise error

    fake_tracer.before_row = staticmethod(before_row)


def test_ctrl_c_leaves_a_resumable_directory(trace, fake_tracer, tmp_path: Path):
    stop_at(fake_tracer, 2, KeyboardInterrupt())
    code, out, err = trace(*DOG)
    assert (code, out) == (130, "")
    assert err.endswith("fasttrace: stopped; run the same command again\n")
    assert len(read_rows(tmp_path / "out")) == 2
    fake_tracer.before_row = staticmethod(lambda number: None)
    assert json.loads(trace(*DOG, "--json")[1])["new"] == 2


def test_a_full_disk_is_a_sentence_and_loses_nothing(
    trace, fake_tracer, tmp_path: Path, monkeypatch
):
    real = os.write

    def full(handle: int, data: bytes) -> int:
        if b'"row"' in bytes(data)[:8]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data)

    def before_row(row: int) -> None:
        if row == 3:
            monkeypatch.setattr(os, "write", full)

    fake_tracer.before_row = staticmethod(before_row)
    code, _, err = trace(*DOG)
    monkeypatch.setattr(os, "write", real)
    assert code == 1
    assert "the disk is full" in err
    assert "Every finished row is safe" in err
    assert len(read_rows(tmp_path / "out")) == 3
    fake_tracer.before_row = staticmethod(lambda number: None)
    assert json.loads(trace(*DOG, "--json")[1])["new"] == 1


def test_a_bug_is_admitted_without_a_traceback(trace, fake_tracer, monkeypatch):
    stop_at(fake_tracer, 1, KeyError("colour"))
    code, _, err = trace(*DOG)
    assert code == 1
    assert "a bug in fasttrace, KeyError: 'colour'" in err
    assert "FASTTRACE_DEBUG=1 fasttrace trace fake" in err
    assert "Traceback" not in err
    monkeypatch.setenv("FASTTRACE_DEBUG", "1")
    with pytest.raises(KeyError):
        trace(*DOG)


def test_out_of_memory_is_no_bug(trace, fake_tracer):
    for error in (
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 6 bytes."),
    ):
        stop_at(fake_tracer, 1, error)
        code, _, err = trace(*DOG)
        assert code == 1
        assert "out of memory" in err
        assert "bug" not in err


def test_output_that_cannot_take_every_character_or_anything(tmp_path: Path, fakes):
    """A pipe in another encoding gets escapes; a full disk behind it a sentence."""
    out = tmp_path / "other"
    call = Call.now("fasttrace trace fake --out other")
    with Store.open(out, fixed={"dtype": "float32"}, call=call) as store:
        for row in fakes.fake_sweep(prompts=2, components=("unet",)):
            store.add(replace(row, attribute="\N{DOG FACE}"))
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    code = "import sys; from fasttrace.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "report", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\U0001f436" in done.stdout
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 1
        assert done.stderr.startswith("fasttrace: the disk is full")


@pytest.fixture
def results(tmp_path: Path, fakes) -> Path:
    out = tmp_path / "results"
    call = Call.now("fasttrace trace fake --out results")
    with Store.open(out, fixed={"dtype": "float32"}, call=call) as store:
        for row in fakes.fake_sweep(prompts=2, components=("unet",)):
            store.add(row)
    return out


def test_report_prints_and_writes(results: Path, capsys):
    assert main(["report", str(results), "--top", "2"]) == 0
    out = capsys.readouterr().out
    assert out.endswith(f"{results / 'report.html'}\n")
    assert "560 rows (8 prompts, 1 seed, 70 sites)" in out
    assert out.count("attn2") >= 4
    assert (results / "report.html").is_file()
    assert (results / "results.parquet").is_file()


def test_a_report_without_causal_sites_says_so(results: Path, capsys):
    assert main(["report", str(results), "--threshold", "1e9"]) == 0
    assert "no causal site: none is above" in capsys.readouterr().out


def test_report_json(results: Path, capsys):
    assert main(["report", str(results), "--json", "--by", "all", "--threshold", "1.5"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["rows"] == 560
    assert all(e["effect"] >= 1.5 and e["group"] == "all" for e in about["causal"])


def test_report_with_a_validation_set(results: Path, tmp_path: Path, capsys):
    labels = tmp_path / "labels.json"
    site = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
    prompts = ("a photo of a red apple on a table", "a small dog in the park")
    judged = [{"prompt": prompt, "site": site, "causal": True} for prompt in prompts]
    labels.write_text(json.dumps({"schema": 1, "labels": judged}))
    assert main(["report", str(results), "--validation", str(labels), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["causal"]
    labels.write_text('{"schema": 1, "labels": [{"prompt": "x"}]}')
    assert main(["report", str(results), "--validation", str(labels)]) == 2
    assert "malformed: labels.0.site: field required" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "code", "sentence"),
    [
        (lambda out: None, 0, ""),
        (lambda out: (out / "fasttrace.json").write_text("{"), 1, "damaged or from another"),
        (lambda out: spoil(out / "rows/shard-0-of-1.jsonl"), 1, "line 1, is damaged"),
        (lambda out: (out / "results.parquet").write_text("x"), 0, ""),
    ],
)
def test_damaged_directories_are_sentences(results: Path, damage, code, sentence, capsys):
    damage(results)
    assert main(["report", str(results), "-q"]) == code
    assert sentence in capsys.readouterr().err


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["nowhere"], 1, "nowhere holds no results"),
        ([], 2, "Missing argument"),
        (["RESULTS", "--top", "0"], 2, "--top 0 leaves nothing"),
        (["RESULTS", "--examples", "-1"], 2, "--examples -1 is below 0"),
        (["RESULTS", "--min-effect", "nan"], 2, "--min-effect is not a number"),
        (["RESULTS", "--threshold", "nan"], 2, "--threshold is not a number"),
        (["RESULTS", "--metric", "hat"], 2, "no row was scored with 'hat'"),
        (["RESULTS", "--by", "hat"], 2, "can't group by 'hat'"),
        (["RESULTS", "--validation", "missing.json"], 2, "can't be read"),
        (["RESULTS", "--threshold", "1", "--validation", "missing.json"], 2, "can't be read"),
    ],
)
def test_wrong_reports(results: Path, arguments, code, sentence, capsys):
    given = [str(results) if a == "RESULTS" else a for a in arguments]
    assert main(["report", *given]) == code
    assert sentence in capsys.readouterr().err


def test_sites(capsys):
    assert main(["sites", "sd14", "--component", "unet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "70 sites"
    assert "unet.down_blocks.0.resnets.0" in lines[0]
    assert "down-0-resnet-0" in lines[0]
    assert main(["sites", "sd14", "--component", "text_encoder", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["kind"] == "attn"
    assert main(["sites", "sdxl", "--count"]) == 0
    assert capsys.readouterr().out == "227\n"
    assert main(["sites", "sd14", "--sites", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "unet", "text", "words"),
    [
        ("sd14", 70, 36, ""),
        ("sd15", 70, 36, ""),
        ("openjourney", 70, 36, ""),
        ("sd21", 70, 69, ""),
        ("sdxl", 227, 132, ""),
        ("sdxl-turbo", 227, 132, "a call has one branch"),
        ("kandinsky21", 52, 108, "listed and counted with component 'prior', not traced"),
        ("kandinsky22", 52, 96, "listed and counted with component 'prior', not traced"),
        ("if", 52, None, "DeepFloyd IF is listed and counted, not traced"),
    ],
)
def test_sites_by_name(name, unet, text, words, capsys):
    """Listed, counted, and what is not traced explained."""
    assert main(["sites", name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[unet] == f"{unet} sites"
    assert words in " ".join(lines[unet + 1 :])
    assert bool(words) == (len(lines) > unet + 1)
    assert main(["sites", name, "--component", "text_encoder", "--count"]) == (0 if text else 2)
    out, errors = capsys.readouterr()
    assert out == (f"{text}\n" if text else "")
    assert text or "has no sites that fasttrace knows" in errors
    prior = name.startswith("kandinsky")
    assert main(["sites", name, "--component", "prior", "--count"]) == (0 if prior else 2)
    assert capsys.readouterr().out == ("40\n" if prior else "")
    assert main(["sites", name, "--quiet"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == unet


def test_a_component_that_is_none(capsys):
    assert main(["sites", "sd14", "--component", "vae"]) == 2
    assert (
        "expected unet, text_encoder (every text encoder), prior or all" in capsys.readouterr().err
    )
    assert main(["trace", "embedded", "--out", "x", "--component", "prior"]) == 2  # not traced


def test_info(capsys):
    assert main(["info", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert {"python", "torch"} <= {fact["name"] for fact in about["facts"]}
    assert main(["info"]) == 0
    assert "python" in capsys.readouterr().out


def test_help_and_version_are_quick():
    """No torch, no table library: the command line answers before anything heavy is loaded."""
    code = (
        "import sys; from fasttrace.cli import main; assert main(['trace', '--help']) == 0; "
        "assert main(['--version']) == 0; "
        "heavy = {'torch', 'pyarrow', 'matplotlib', 'jinja2', 'numpy'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--seeds" in done.stdout
    assert f"fasttrace {fasttrace.__version__}" in done.stdout


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 2
    assert "Commands:" in capsys.readouterr().err


def test_the_demo_prints_five_sites_for_each_attribute(fake_tracer, tmp_path: Path, capsys):
    assert main(["demo", "--out", str(tmp_path / "demo"), "-q"]) == 0
    out = capsys.readouterr().out
    for attribute in ("object", "style", "colour", "action"):
        for component in ("UNet", "Text encoder"):
            assert f"{attribute}, {component}" in out
    assert "(n = 5 prompts)" in out
    assert f"report: {tmp_path / 'demo' / 'report.html'}" in out
    assert (tmp_path / "demo" / "report.html").is_file()
    text = next(c for c in fake_tracer.calls if c["component"] == "text_encoder")
    assert text["tokens"] == ["last subject", "EOS", "padding"]
    assert main(["demo", "--out", str(tmp_path / "demo"), "--json", "-q"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["new"] == 0
    assert about["rows"] == about["planned"]


def test_the_full_demo_takes_every_probe_and_seed(fake_tracer, tmp_path: Path, capsys):
    assert main(["demo", "--full", "--out", str(tmp_path / "d"), "-q", "--json"]) == 0
    full = json.loads(capsys.readouterr().out)["planned"]
    assert main(["demo", "--out", str(tmp_path / "e"), "-q", "--json"]) == 0
    assert full > 2 * json.loads(capsys.readouterr().out)["planned"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sd15", "--component", "text_encoder"], "bare architecture"),
        (["sd15", "--gpu", "Z80"], "Unknown device 'Z80'"),
        ([], "plan needs one model"),
        (["sd15", "--model", "sdxl"], "plan needs one model"),
        (["sd15", "--memory", "2GB"], "take 2.0 GiB in 16 bits: more than --memory"),
        (["sd15", "--memory", "much"], "--memory 'much' can't be read"),
        (["embedded", "--memory", "24GB"], "go with a bare architecture"),
        (["if"], "'if' is listed and counted, not traced"),
        (["sd15", "--clean", "both"], "clean is one of auto, leader, cache"),
        (["sd15", "--lanes", "2"], "at least 4 lanes"),
        (["sd15", "--cache", "-1"], "not a positive number of GiB"),
        (["nowhere-at-all"], "nowhere-at-all"),
    ],
)
def test_plans_that_cannot_be_made(capsys, arguments, words):
    assert main(["plan", *arguments]) in (1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert "bug" not in err
