"""Sources from the words of a call to the rows of a trace."""

import os

import pytest
import torch
from safetensors.torch import save_file

from fasttrace import Probe, Source, Tracer, parse_plan
from fasttrace.adapters.pipeline import Model
from fasttrace.errors import UsageError
from fasttrace.plan.sources import fitted
from fasttrace.plan.tensor_file import read_tensors
from fasttrace.store import read_rows
from fasttrace.types import Site

PROBE = Probe("a photo of a dog in the house", "dog")
SITES = ["attn2", "unet.mid_block.resnets.0"]
SETTING = {"steps": 3, "guidance": 3.0, "metric": "latent_distance"}


def every_source(width: int) -> list[Source | str]:
    direction = torch.linspace(-1, 1, width)
    return [
        "clean",
        "zero",
        "mean",
        "prompt:a tiny cat",
        Source("add", values=direction, strength=4.0, label="dogness x 4"),
        Source("tensor", values=direction),
        Source("zero", strength=0.5),
    ]


@pytest.mark.parametrize("base", ["corrupt", "clean"])
def test_rows_of_both_engines(sd, base):
    fast, slow = Tracer(sd), Tracer(sd, engine="reference")
    site = fast.sites(sites="unet.mid_block.resnets.0")[0]
    sources = every_source(site.shape[0])[base == "clean" :]
    setting = {**SETTING, "sites": site.name, "source": sources, "base": base}
    rows, expected = fast.trace([PROBE], **setting).rows, slow.trace([PROBE], **setting).rows
    titles = ["all", "zero", "mean", "prompt 'a tiny cat'", "dogness x 4", "tensor", "zero x 0.5"]
    assert [row.selector for row in rows] == titles[base == "clean" :]
    assert len({row.score for row in rows}) == len({row.key for row in rows}) == len(sources)
    for one, other in zip(rows, expected, strict=True):
        assert one.score == pytest.approx(other.score, rel=1e-4)
        # A distance: nearer to the clean run is better, so effects are turned.
        lost = one.score - one.clean_score if base == "clean" else one.corrupt_score - one.score
        assert one.effect == pytest.approx(lost)
        assert one.corruption == other.corruption
    assert ('"base":"clean"' in rows[0].corruption) == (base == "clean")


def test_text_encoder_rows(sd):
    rows = {}
    for engine in ("fast", "reference"):
        result = Tracer(sd, engine=engine).trace(
            [PROBE],
            component="text_encoder",
            sites="mlp",
            tokens=["earlier", "last subject"],
            source=["clean", "zero"],
            **SETTING,
        )
        rows[engine] = result.rows
    labels = ["earlier", "earlier; zero", "last subject", "last subject; zero"]
    assert [row.selector for row in rows["fast"]][:4] == labels
    # What comes before the subject is the same in both runs, so zero alone changes it.
    assert [row.status for row in rows["fast"]][:4] == ["zero: causal mask", "run", "run", "run"]
    for one, other in zip(rows["fast"], rows["reference"], strict=True):
        assert one.score == pytest.approx(other.score, rel=1e-4, abs=1e-5)


def test_keys_are_of_what_is_written(sd):
    tracer = Tracer(sd)

    def keys(source, **rest):
        plan = tracer.plan(PROBE, sites="attn2", source=source, **SETTING | rest)
        return set(plan.keys)

    direction = torch.randn(tracer.sites(sites="attn2")[0].shape[-1])
    by_site = {
        site.name: torch.randn(site.shape[-1], generator=torch.Generator().manual_seed(1))
        for site in tracer.sites(sites="attn2")
    }
    found = [
        keys("clean"),
        keys("zero"),
        keys("zero", base="clean"),
        keys("prompt:a cat"),
        keys("prompt:a dog"),
        keys(Source("tensor", values=by_site)),
        keys(Source("add", values=by_site)),
        keys(Source("add", values=by_site, strength=2)),
        keys(Source("add", values={n: -v for n, v in by_site.items()})),
    ]
    assert len(set().union(*found)) == sum(map(len, found))
    # A title is no part of it, nor in whose hands the numbers lie.
    again = {name: value.clone() for name, value in by_site.items()}
    assert keys(Source("add", values=again, label="another")) == found[6]
    value = next(iter(by_site.values()))
    assert direction.shape == value.shape


def test_a_tensor_of_the_callers_stays_as_it_was(sd):
    tracer = Tracer(sd)
    site = tracer.sites(sites="unet.mid_block.resnets.0")[0]
    given = torch.ones(site.shape)
    setting = {**SETTING, "sites": site.name}
    plan = tracer.plan(PROBE, source=Source("tensor", values=given), **setting)
    given.fill_(7)  # after planning: the plan has its own copy
    [(row, _)] = tracer.iter_rows(plan)
    ones = Source("tensor", values=torch.ones(site.shape))
    [(expected, _)] = tracer.iter_rows(tracer.plan(PROBE, source=ones, **setting))
    assert (row.key, row.score) == (expected.key, expected.score)


REFUSED = {
    "a kind": ("zeros", "Unknown source 'zeros'.*Did you mean 'zero'"),
    "no source": ([], "list of sources is empty"),
    "its own run": ("corrupt", "corrupt activation written into the corrupt run changes nothing"),
    "no prompt": ("prompt", "has a prompt"),
    "a number": (3, "a word or a fasttrace.Source"),
    "twice": (["zero", "zero"], "called the same"),
    "a long prompt": ("prompt:" + "dog " * 40, "tokens|window|long"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(sd, name):
    source, words = REFUSED[name]
    with pytest.raises(UsageError, match=words):
        Tracer(sd).plan(PROBE, source=source, **SETTING)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kind": "tensor"}, "needs values"),
        ({"kind": "zero", "values": torch.zeros(3)}, "takes no values"),
        ({"kind": "zero", "strength": 0}, "above 0"),
        ({"kind": "mean", "strength": 1.5}, "at most 1"),
        ({"kind": "add", "values": torch.zeros(3), "strength": float("nan")}, "a finite number"),
        ({"kind": "zero", "prompt": "a dog"}, "no other source"),
    ],
)
def test_records_refused(given, words):
    with pytest.raises(UsageError, match=words):
        Source(**given)


TOKENS = Site("unet.attn2", "attn2", "unet", 0, (64, 32))
PLACES = Site("unet.resnet", "resnet", "unet", 0, (32, 8, 8))


@pytest.mark.parametrize(
    ("site", "shape", "expected"),
    [
        (TOKENS, (64, 32), (1, 64, 32)),
        (TOKENS, (32,), (1, 1, 32)),
        (TOKENS, (5, 64, 32), (5, 64, 32)),
        (TOKENS, (5, 32), (5, 1, 32)),
        (PLACES, (32, 8, 8), (1, 32, 8, 8)),
        (PLACES, (32,), (1, 32, 1, 1)),
        (PLACES, (5, 32), (5, 32, 1, 1)),
        (PLACES, (5, 32, 8, 8), (5, 32, 8, 8)),
        (TOKENS, (64,), None),
        (TOKENS, (4, 32), None),
        (TOKENS, (1, 64, 32), None),
        (PLACES, (8, 8), None),
        (PLACES, (), None),
    ],
)
def test_shapes(site, shape, expected):
    value = torch.randn(shape)
    if expected is None:
        with pytest.raises(UsageError, match="expected \\[(64, 32|32, 8, 8)\\] or \\[32\\]"):
            fitted(value, site, 5, "x")
        return
    found = fitted(value, site, 5, "x")
    assert found.shape == expected
    assert torch.equal(found.flatten(), value.flatten())


def test_numbers():
    with pytest.raises(UsageError, match="NaN or infinity"):
        fitted(torch.full((32,), float("nan")), TOKENS, 5, "x")
    with pytest.raises(UsageError, match="floating point"):
        fitted(torch.zeros(32, dtype=torch.int64), TOKENS, 5, "x")


def test_tensors_by_site(sd):
    tracer = Tracer(sd)
    site, other, *_ = tracer.sites(sites="attn2")
    value = torch.zeros(site.shape)
    for name in (site.name, site.name.removeprefix("unet."), site.aliases[0]):
        source = Source("tensor", values={name: value})
        assert tracer.plan(PROBE, sites=site.name, source=source, **SETTING).total == 1
    with pytest.raises(UsageError, match=f"has no tensor for {other.name}"):
        tracer.plan(PROBE, sites=[site.name, other.name], source=source, **SETTING)
    with pytest.raises(UsageError, match="none of the chosen sites"):
        tracer.plan(PROBE, sites=other.name, source=source, **SETTING)


# ---- tensors of a plan file

HOSTILE = (
    "/etc/passwd",
    "../x.safetensors",
    "a/../../x.safetensors",
    "..safetensors",
    "x.bin",
    "x.safetensors/",
    "~/x.safetensors",
    "a\\x.safetensors",
    "file:///x.safetensors",
    ".hidden/x.safetensors",
    "x.safetensors\0.bin",
    "a//x.safetensors",
    "a/" * 9 + "x.safetensors",
)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names(tmp_path, name):
    with pytest.raises(UsageError, match="is refused"):
        read_tensors(tmp_path, name)


def test_files(tmp_path):
    folder = tmp_path / "plan"
    (folder / "inner").mkdir(parents=True)
    save_file({"a": torch.ones(2)}, tmp_path / "outside.safetensors")
    save_file({"a": torch.ones(2)}, folder / "inner" / "x.safetensors")
    assert torch.equal(read_tensors(folder, "inner/x.safetensors")["a"], torch.ones(2))
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (folder / "way").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "folder.safetensors").mkdir()
    (folder / "words.safetensors").write_text("no tensors")
    with (folder / "large.safetensors").open("wb") as file:
        file.truncate(1 << 40)
    for name, words in {
        "link.safetensors": "links are not followed",
        "way/outside.safetensors": "links are not followed",
        "absent.safetensors": "can't be read",
        "pipe.safetensors": "no ordinary file",
        "folder.safetensors": "no ordinary file",
        "words.safetensors": "is no safetensors",
        "large.safetensors": "more than 1 GiB",
    }.items():
        with pytest.raises(UsageError, match=words):
            read_tensors(folder, name)


def test_a_plan_with_tensors(write_plan, folders, loaded, tmp_path, capsys):
    from fasttrace.cli import main

    site = Model(loaded("sd")).sites(16, 16).sites[6]
    direction = torch.randn(site.shape[0] if len(site.shape) == 3 else site.shape[1])
    save_file({"dog": direction, "cat": -direction}, tmp_path / "features.safetensors")
    add = {"kind": "add", "file": "features.safetensors", "tensor": "dog", "strength": 3.0}
    sources = [{"kind": "zero"}, {"kind": "prompt", "prompt": "a tiny cat"}, add]
    plan = write_plan(sites=[site.name], sources=sources, base="clean")
    out = tmp_path / "out"
    options = ["run", str(plan), "--model", str(folders["sd"]), "--quiet", "--out"]
    assert main([*options, str(out)]) == 0
    rows = read_rows(out)
    tracer = Tracer(loaded("sd"))
    expected = tracer.trace(
        [PROBE],
        seeds=2,
        steps=3,
        guidance=3.0,
        metric="latent_recovery",
        sites=site.name,
        source=["zero", "prompt:a tiny cat", Source("add", values=direction, strength=3.0)],
        base="clean",
    ).rows
    assert {(r.key, r.score) for r in rows} == {(r.key, r.score) for r in expected}
    assert {r.selector for r in rows} == {"zero", "prompt 'a tiny cat'", "add dog x 3"}
    # A directory keeps the run that its effects are measured from.
    write_plan(sites=[site.name])
    assert main([*options, str(out)]) == 1
    assert "base=clean" in capsys.readouterr().err
    write_plan(sites=[site.name], sources=[add | {"tensor": "bird"}])
    assert main([*options, str(tmp_path / "other")]) == 2
    assert "has no tensor 'bird'; it has cat, dog" in capsys.readouterr().err


def test_a_plan_without_its_folder():
    plan = parse_plan(
        {
            "probes": [{"prompt": "a dog", "subject": "dog"}],
            "sources": [{"kind": "tensor", "file": "x.safetensors"}],
        }
    )
    with pytest.raises(UsageError, match="beside the plan"):
        plan.asked_sources()
