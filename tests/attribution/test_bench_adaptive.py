"""The stored exact scores, and the table made of them: what is committed is what comes out."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fasttrace import Probe, Tracer
from fasttrace.store import read_rows
from fasttrace.testing import tiny_pipeline

BENCH = Path(__file__).parents[2] / "bench"
MODULES = ("adaptive", "adaptive_scores", "audits")


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """bench/ is no package, and its modules import one another by name."""
    sys.path.insert(0, str(BENCH))
    try:
        import adaptive

        yield adaptive
    finally:
        sys.path.remove(str(BENCH))
        for name in MODULES:
            sys.modules.pop(name, None)


def committed(part: str) -> list[dict[str, str]]:
    with (BENCH / "adaptive.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["part"] == part]


def as_text(row: Any) -> dict[str, str]:
    values = asdict(row).items()
    return {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in values}


@pytest.mark.parametrize(("metric", "group"), [("latent_recovery", "colour"), ("attribute", "all")])
def test_the_table_of_races_is_what_races_give(bench, metric, group):
    scores = bench.read()[metric, group]
    again = as_text(bench.race_row(scores))
    [kept] = [
        row
        for row in committed("race")
        if (row["metric"], row["pairs_of"], row["pairs"]) == (metric, group, str(scores.pairs))
    ]
    assert {name: kept[name] for name in again} == again


def test_targets_that_are_claimed():
    races = committed("race")
    assert len(races) == 3 * (4 + 4 + 1)
    assert all(int(row["right"]) >= 182 for row in races)
    met = [r for r in races if r["metric"] == "latent_recovery" and int(r["pairs"]) >= 96]
    assert all(float(row["share_mean"]) <= 0.25 for row in met)
    assert len(met) == 5
    audits = committed("audit")
    assert len(audits) == 384
    assert all(int(row["too_low"]) <= 18 for row in audits)


def test_the_table_of_audits_is_what_audits_give(bench):
    scores, screened = bench.read(), bench.read_screens()
    key = "latent_recovery", "style"
    audits = bench.audit_rows({key: scores[key]}, {key: screened[key]}, [key])
    rows = {
        (r["screen"], r["cut"], r["sample"]): r
        for r in committed("audit")
        if (r["metric"], r["pairs_of"]) == key
    }
    again = [as_text(row) for row in audits]
    assert len(again) == len(rows) == 32
    for row in again:
        kept = rows[row["screen"], row["cut"], row["sample"]]
        assert {name: kept[name] for name in row} == row


def test_a_folder_is_kept_whole(bench, monkeypatch, tmp_path):
    """Effects of every pair and site, in order, with what decides whether a pair counts."""
    tracer = Tracer(tiny_pipeline("sd"))
    probes = [Probe("a photo of a red dog", "dog", "object"), Probe("a blue cat", "blue", "colour")]
    asked = {"seeds": 2, "steps": 1, "metric": ["latent_recovery", "latent_distance"]}
    result = tracer.trace(probes, **asked, sites="attn2", pictures=False)
    result.save(tmp_path / "out")
    bench.keep(tmp_path / "out", tmp_path / "small.parquet")
    scores = sys.modules["adaptive_scores"]
    monkeypatch.setattr(scores, "METRICS", ("latent_recovery", "latent_distance"))
    found = scores.read(tmp_path / "small.parquet")
    for (metric, group), own in found.items():
        rows = [
            row
            for row in read_rows(tmp_path / "out")  # by attribute, prompt, seed and site
            if row.metric == metric and group in ("all", row.attribute)
        ]
        assert own.pairs == {"all": 4, "object": 2, "colour": 2}.get(group, 0)
        assert own.effects.ravel() == pytest.approx([row.effect for row in rows], rel=1e-6)
        every = [row.total_effect > row.noise_floor for row in rows]
        assert own.counted.repeat(len(own.sites)).tolist() == every
        assert own.seeds.repeat(len(own.sites)).tolist() == [row.seed for row in rows]
        assert own.sites == tuple(dict.fromkeys(row.site for row in result.rows))
