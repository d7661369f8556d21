"""What a screen answers, keeps and gives to other tools."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from fasttrace import Corruption, Probe, Tracer
from fasttrace.attribution.result import Screen, load_screen
from fasttrace.attribution.result import joined as join
from fasttrace.errors import StoreError, UsageError
from fasttrace.testing import tiny_pipeline

PROBES = [Probe("a photo of a red dog", "dog", "object"), Probe("a blue cat", "blue", "colour")]
ASKED = {"steps": 2, "metric": "latent_recovery", "branch": "both", "window": [(0, 2), (1, 2)]}


@pytest.fixture(scope="module")
def tracer():
    return Tracer(tiny_pipeline("sd"))


@pytest.fixture(scope="module")
def screen(tracer) -> Screen:
    return tracer.screen(PROBES, seeds=2, by=("site", "head", "token"), **ASKED)


def test_one_way_back_holds_everything(screen, tracer):
    assert [(p.probe, p.seed) for p in screen.pairs] == [(p, s) for p in PROBES for s in (0, 1)]
    assert screen.calls == 3  # PNDM makes one call more
    sites = tracer.sites()
    for site in sites:
        whole = screen.effects(site.name)
        assert whole.shape == (4, 1)
        parts = [
            screen.effects(site.name, (c, c + 1), branch)
            for c in range(screen.calls)
            for branch in ("cond", "uncond")
        ]
        np.testing.assert_allclose(sum(parts), whole, rtol=1e-9, atol=1e-12)
        half = screen.effects(site.name, (0.0, 0.5), "cond")
        assert half.shape == (4, 1)
    heads = [r for r in screen.readings if r.axis == "head"]
    assert {r.kind for r in heads} == {"attn1", "attn2"}
    assert {(r.part, r.size) for r in screen.readings if r.axis == "token"} == {
        ("key", 24), ("value", 24),
    }  # fmt: skip


def test_pairs_do_not_know_each_other(screen, tracer):
    """In other groups, in other rows: what differs is rounding. (The noise's size is one of the
    probes together, unless it is given.)"""
    sigma = Corruption(sigma=json.loads(screen.manifest["corruption"])["sigma"])
    alone = [
        tracer.screen(
            [probe], seeds=[s], lanes=1, by=("site", "head", "token"), corruption=sigma, **ASKED
        )
        for probe in PROBES
        for s in (0, 1)
    ]
    both = join(alone)
    assert [(p.probe, p.seed) for p in both.pairs] == [(p.probe, p.seed) for p in screen.pairs]
    for reading in screen.readings:
        a, b = screen.effects(reading), both.effects(reading)
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4 * np.abs(a).max() + 1e-9)
    assert both.generations == pytest.approx(np.mean([s.generations for s in alone]))
    with pytest.raises(UsageError, match="can.t be joined: their"):
        join([alone[0], replace(alone[1], estimator="other")])


def test_progress_counts_pairs(tracer):
    seen = []
    tracer.screen(PROBES, seeds=2, on_progress=lambda *p: seen.append(p), lanes=3, **ASKED)
    assert seen == [(3, 4), (4, 4)]


def test_ranking(screen):
    ranked = screen.ranking()
    effects = [r.effect for r in ranked]
    assert effects == sorted(effects, reverse=True)
    first = ranked[0]
    used = [i for i, p in enumerate(screen.pairs) if not p.note]
    assert first.effect == pytest.approx(screen.effects(first.site)[used].mean())
    total = np.mean([screen.pairs[i].total_effect for i in used])
    assert first.share == pytest.approx(first.effect / total)
    values = screen.ranking("token", window=(0, 1), part="value")
    assert {r.part for r in values} == {"value"}
    assert len(values) == 24 * len({r.site for r in values})
    with pytest.raises(UsageError, match="Nothing was screened by 'neuron'"):
        screen.ranking("neuron")
    text = str(screen)
    assert first.site in text
    assert "generations a pair" in text


def test_wrong_questions(screen):
    with pytest.raises(UsageError, match="was not screened"):
        screen.effects("unet.nowhere")
    with pytest.raises(UsageError, match="branch"):
        screen.effects(screen.readings[0], branch="neither")
    with pytest.raises(UsageError, match="window"):
        screen.effects(screen.readings[0], (2, 9))


def test_save_and_load(screen, tmp_path):
    screen.save(tmp_path / "out")
    again = load_screen(tmp_path / "out")
    assert again.readings == screen.readings
    assert again.pairs == screen.pairs
    assert (again.windows, again.branches) == (screen.windows, screen.branches)
    assert again.ranking() == screen.ranking()
    assert all(np.array_equal(again.scores[k], v) for k, v in screen.scores.items())
    table = pq.read_table(tmp_path / "out" / "screen.parquet").to_pylist()
    coordinates = sum(r.size for r in screen.readings)
    assert len(table) == coordinates * 2 * 2 * 4  # windows, branches, pairs
    line = next(
        r
        for r in table
        if r["axis"] == "all" and r["window_start"] == 1 and r["branch"] == "uncond" and r["seed"]
    )
    own = screen.effects(line["site"], (1, 2), "uncond")
    assert line["effect"] == own[1, 0]
    (tmp_path / "out" / "screen.safetensors").write_bytes(b"{}")
    with pytest.raises(StoreError, match="no screen that can be read"):
        load_screen(tmp_path / "out")
    with pytest.raises(StoreError):
        load_screen(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="can't be written"):
        screen.save(tmp_path / "file" / "below")


def test_text_encoder_screens(tracer):
    screen = tracer.screen(PROBES[:1], steps=2, component="text_encoder", metric="latent_recovery")
    assert {r.axis for r in screen.readings} == {"token"}
    assert "token" in {r.axis for r in screen.ranking("token")}
    with pytest.raises(UsageError, match="has no windows"):
        screen.effects(screen.readings[0], (0, 1))


def test_cost_does_not_depend_on_what_is_asked(tracer):
    asked = {"steps": 8, "metric": "latent_recovery"}
    few = tracer.screen(PROBES[:1], sites="attn2", **asked)
    every = tracer.screen(PROBES[:1], by=("site", "head", "token", "channel", "neuron"), **asked)
    assert every.flops == pytest.approx(few.flops, rel=0.1)
    assert every.generations < 5.5
