"""Entry points of a package that is not there: a fake distribution on sys.path."""

import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fasttrace import Probe, Tracer
from fasttrace.adapters.pipeline import Model, family_of
from fasttrace.adapters.selection import EVERY
from fasttrace.adapters.stable import Stable
from fasttrace.cli import main
from fasttrace.errors import ModelError, UsageError
from fasttrace.plugins import TAKEN, PluginWarning, plugins
from fasttrace.testing import tiny_pipeline

PROBE = Probe("a photo of a dog in the house", "dog")
SETTING: dict[str, Any] = {"steps": 3, "guidance": 3.0}
CODE = """
from fasttrace.adapters.stable import Stable
from fasttrace.types import Metric


def brightness(model):
    return Metric("brightness", "mean of the picture", lambda x, context: x.mean((1, 2, 3)))


darkness = Metric("darkness", "1 - mean", lambda x, context: 1 - x.mean((1, 2, 3)))


alone = Metric("alone", "takes no context", lambda x: x.mean((1, 2, 3)))


def fails(*args):
    raise ValueError("I am broken\\nin two lines")


def number(model):
    return 3


class Family(Stable):
    @classmethod
    def accepts(cls, pipe):
        return getattr(pipe, "of_the_fake_family", False)


class Half:
    def __init__(self, pipe):
        pass

    @classmethod
    def accepts(cls, pipe):
        return True


class Refuses:
    accepts = fails


def convolutions(unet):
    return ["conv_in", "unet.mid_block.resnets.0.conv1"]


def odd(unet):
    # shared and called thrice in a pass; no module; a site there is already
    return ["mid_block.resnets.0.nonlinearity", "nowhere", "mid_block.resnets.0", "conv_out"]
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts a distribution with these entry points on sys.path."""

    def put(**groups: str) -> None:
        (tmp_path / "fake_plugin.py").write_text(CODE, encoding="utf-8")
        (tmp_path / "fake_ending.py").write_text("raise SystemExit(3)")
        about = tmp_path / "fake_plugin-1.0.dist-info"
        about.mkdir(exist_ok=True)
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-plugin\nVersion: 1.0\n")
        lines = [f"[fasttrace.{g}]\n{textwrap.dedent(points)}" for g, points in groups.items()]
        (about / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        plugins.cache_clear()

    yield put
    sys.modules.pop("fake_plugin", None)
    monkeypatch.undo()
    plugins.cache_clear()


def test_metrics(sd, install):
    install(metrics="bright = fake_plugin:brightness\ndark = fake_plugin:darkness")
    rows = Tracer(sd).trace(PROBE, sites="attn2", metric=["bright", "dark"], **SETTING).rows
    scores = {row.metric: row.score for row in rows if row.site == rows[0].site}
    assert scores["brightness"] + scores["darkness"] == pytest.approx(1)


def test_metrics_that_fail(sd, install):
    install(
        metrics="""\
        absent = fake_plugin:nowhere
        missing = no_such_module:metric
        broken = fake_plugin:fails
        odd = fake_plugin:number
        alone = fake_plugin:alone
        bright = fake_plugin:brightness
        clip_score = fake_plugin:brightness
        """
    )
    tracer = Tracer(sd)
    with (
        pytest.warns(PluginWarning) as caught,
        pytest.raises(UsageError, match=r"hub id>, alone, bright, broken, odd\."),
    ):
        tracer.plan(PROBE, sites="attn2", metric="bightness", **SETTING)
    said = sorted(str(one.message) for one in caught)
    assert len(said) == 2  # once a process
    assert said[0].startswith("The metric 'absent' of 'fake-plugin' can't be loaded (Attribute")
    assert "No module named 'no_such_module'" in said[1]
    with pytest.raises(ModelError, match=r"'broken' fails: ValueError: I am broken\.$"):
        tracer.plan(PROBE, metric="broken", **SETTING)
    with pytest.raises(ModelError, match="'odd' made a int"):
        tracer.plan(PROBE, metric="odd", **SETTING)
    with pytest.raises(ModelError, match=r"'alone' fails: TypeError: .*It is called with pictures"):
        tracer.trace(PROBE, sites="attn2", metric="alone", **SETTING)
    assert tracer.plan(PROBE, sites="attn2", metric="bright", **SETTING).metrics[0].key
    # A name of our own stays ours.
    assert tracer.plan(PROBE, metric="latent_distance", **SETTING).metrics[0].needs == "latent"


def test_families(install):
    install(families="fake = fake_plugin:Family")
    pipe = tiny_pipeline("sd")
    assert type(family_of(pipe)) is Stable
    pipe.of_the_fake_family = True
    assert type(Model(pipe).family).__name__ == "Family"
    [(row, _)] = Tracer(pipe).run(
        Tracer(pipe).plan(
            PROBE, sites="unet.mid_block.resnets.0", metric="latent_distance", **SETTING
        )
    )
    assert row.score > 0


def test_families_that_fail(sd, install):
    install(
        families="""\
        absent = no_such_module:Family
        half = fake_plugin:Half
        refuses = fake_plugin:Refuses
        word = fake_plugin:darkness
        """
    )
    with pytest.warns(PluginWarning) as caught:
        family = family_of(sd)
    assert type(family) is Stable
    said = [str(one.message) for one in caught]
    assert len(said) == 4
    assert any("'half' lacks scale, unit" in one for one in said)
    assert any("'refuses' fails on this pipeline (ValueError: I am broken)" in one for one in said)


def test_site_kinds(install):
    pipe = tiny_pipeline("sd")
    plain = Tracer(pipe).sites()
    install(site_kinds="conv = fake_plugin:convolutions")
    tracer = Tracer(pipe)
    assert [site.name for site in tracer.sites()] == [site.name for site in plain]
    sites = tracer.sites(sites="conv")
    assert [s.name for s in sites] == ["unet.conv_in", "unet.mid_block.resnets.0.conv1"]
    assert {site.kind for site in sites} == {"conv"}
    asked = {"sites": "conv", "source": ["zero", "clean"], "base": "corrupt", "window": (1, 4)}
    found = [
        Tracer(pipe, engine=engine).trace(PROBE, metric="latent_distance", **asked, **SETTING).rows
        for engine in ("fast", "reference")
    ]
    assert len(found[0]) == 4
    for one, other in zip(*found, strict=True):
        assert one.score == pytest.approx(other.score, rel=1e-4)
        assert one.kind == "conv"


def test_site_kinds_that_fail(install):
    pipe = tiny_pipeline("sd")
    install(
        site_kinds="""\
        absent = no_such_module:sites
        broken = fake_plugin:fails
        odd = fake_plugin:odd
        conv = fake_plugin:convolutions
        """
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tracer = Tracer(pipe)
        names = [site.name for site in tracer.sites(sites=["odd", "conv"])]
        # The others' sites and the model's own still trace.
        rows = tracer.trace(
            PROBE, sites=["attn2", "conv"], metric="latent_distance", **SETTING
        ).rows
    assert names == ["unet.conv_in", "unet.mid_block.resnets.0.conv1", "unet.conv_out"]
    assert {row.kind for row in rows} == {"attn2", "conv"}
    said = {str(one.message) for one in caught if one.category is PluginWarning}
    for words in (
        "'absent' of 'fake-plugin' can't be loaded",
        "'broken' fails on this UNet (ValueError: I am broken)",
        "names 'nowhere', which is no module",
        "nonlinearity, which is called 3 times in a forward pass",
    ):
        assert any(words in sentence for sentence in said), (words, said)


def test_on_the_command_line(install, folders, tmp_path, capsys):
    install(metrics="bright = fake_plugin:brightness")
    out = tmp_path / "out"
    words = ["--prompt", PROBE.prompt, "--subject", "dog", "--sites", "attn2", "--steps", "2"]
    assert main(["trace", str(folders["sd"]), "--out", str(out), *words, "--metric", "bright"]) == 0


def test_nothing_is_registered_here():
    assert {group: dict(plugins(group)) for group in ("fasttrace.metrics",)} == {
        "fasttrace.metrics": {}
    }


def test_site_kinds_of_our_own_stay_ours(sd, install):
    before = Tracer(sd).sites()
    install(site_kinds="attn2 = fake_plugin:brightness\npaper = fake_plugin:brightness")
    with pytest.warns(PluginWarning) as caught:
        assert Tracer(sd).sites() == before
    assert all("has a name that is taken" in str(one.message) for one in caught)
    text = Tracer(sd).sites(component="text_encoder")
    assert {site.kind for site in (*before, *text)} | {*EVERY} <= TAKEN


def test_a_plugin_that_ends_the_process(sd, install):
    install(metrics="bright = fake_plugin:brightness\nends = fake_ending:metric")
    with pytest.warns(PluginWarning, match="'ends' of 'fake-plugin' can't be loaded"):
        assert Tracer(sd).plan(PROBE, sites="attn2", metric="bright", **SETTING).metrics
