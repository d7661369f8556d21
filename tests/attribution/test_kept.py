"""A stopped `find` or `screen` goes on where it was, and says what it would have said."""

from __future__ import annotations

import numpy as np
import pytest

from fasttrace import Probe, Tracer
from fasttrace.attribution.kept import PARTS, ROWS, clear, keeping
from fasttrace.errors import StoreError, UsageError

PROBES = [Probe("a photo of a red dog", "dog"), Probe("a big house", "house")]
ASKED = {"steps": 1, "top": 2, "audit": 2, "groups": 2, "inside": 1, "estimator": "plain"}


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def tracer(sd):
    return Tracer(sd)


@pytest.fixture(scope="module")
def whole(tracer):
    return tracer.find(PROBES, **ASKED)


def stop_at(stage, number):
    """An `on_progress` that ends the work behind so many steps of a stage, as a kill would."""
    seen = []

    def told(name, done, total):
        seen.append((name, done, total))
        if sum(one[0] == stage for one in seen) == number:
            raise Stop

    return told


def same(one, other):
    assert [p.why for p in one.places] == [p.why for p in other.places]
    for a, b in ((one.places, other.places), (one.finer, other.finer)):
        assert [p.name for p in a] == [p.name for p in b]
        for p, q in zip(a, b, strict=True):
            assert p.screened == pytest.approx(q.screened, rel=1e-5, abs=1e-7)
            assert (p.exact is None) == (q.exact is None)
            assert p.exact is None or p.exact == pytest.approx(q.exact, rel=1e-5, abs=2e-6)
    assert [t.places for t in one.together] == [t.places for t in other.together]
    assert one.cost == other.cost
    assert [row.key for row in one.rows] == [row.key for row in other.rows]


@pytest.mark.parametrize(("stage", "number"), [("pairs", 1), ("rows", 7), ("rows", -1)])
def test_a_stopped_find_goes_on(tracer, whole, tmp_path, stage, number):
    keep = tmp_path / "kept"
    everything = len(whole.rows) + len(whole.together) * 2 + 2
    number %= everything
    with pytest.raises(Stop):
        tracer.find(PROBES, keep=keep, on_progress=stop_at(stage, number), **ASKED)
    made = [], []
    for told in made:
        found = tracer.find(PROBES, keep=keep, on_progress=lambda *a, t=told: t.append(a), **ASKED)
        same(found, whole)
    rows = [sum(name == "rows" for name, *_ in told) for told in made]
    assert rows[0] == everything - (number if stage == "rows" else 0)
    assert rows[1] == 0
    clear(keep)
    assert not keep.exists()


def test_more_is_asked(tracer, whole, tmp_path):
    """Rows are used by a call that asks otherwise, where they answer it."""
    keep, told = tmp_path / "kept", []
    tracer.find(PROBES, keep=keep, **ASKED)
    found = tracer.find(
        PROBES,
        keep=keep,
        on_progress=lambda *a: told.append(a),
        **ASKED | {"top": 3, "groups": 0, "inside": 0},
    )
    more = {row.key for row in found.rows} - {row.key for row in whole.rows}
    assert 0 < sum(name == "rows" for name, *_ in told) == len(more) < len(found.rows)


def test_a_stopped_screen_goes_on(tracer, tmp_path):
    keep = tmp_path / "kept"
    asked = {"steps": 1, "lanes": 1, "seeds": [0, 1], "by": ("site", "head")}
    whole = tracer.screen(PROBES, **asked)
    with pytest.raises(Stop):
        tracer.screen(PROBES, keep=keep, on_progress=lambda *a: stop_at("", 1)("", *a), **asked)
    [file] = keep.glob("*.safetensors")
    before = file.stat().st_mtime_ns
    found = tracer.screen(PROBES, keep=keep, **asked)
    assert file.stat().st_mtime_ns == before
    assert len(list(keep.glob("*.safetensors"))) == 4
    assert found.pairs == whole.pairs
    assert found.manifest == whole.manifest
    for key, scores in whole.scores.items():
        np.testing.assert_allclose(found.scores[key], scores, rtol=1e-4, atol=1e-7)
    # Other questions are not answered by these files.
    for other in ({"by": "site"}, {"estimator": "averaged:2"}, {"horizon": 1}, {"guidance": 3.0}):
        tracer.screen(PROBES[:1], keep=keep, **asked | {"seeds": [0]} | other)
    assert len(list(keep.glob("*.safetensors"))) == 8


def test_what_goes_wrong(tracer, tmp_path):
    keep = tmp_path / "kept"
    with pytest.raises(UsageError, match="Unknown estimator"):
        tracer.find(PROBES, keep=keep, **ASKED | {"estimator": "none"})
    assert not keep.exists()
    with keeping(keep), pytest.raises(StoreError, match="another process works on"):
        tracer.find(PROBES, keep=keep, **ASKED)
    assert not keep.exists()
    with keeping(keep) as kept, pytest.raises(StoreError, match="not a finite number"):
        kept.add_parts("key", np.array([np.nan]), 3)
    tracer.screen(PROBES, keep=keep, steps=1)
    [file] = keep.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(StoreError, match="no screen that can be read"):
        tracer.screen(PROBES, keep=keep, steps=1)
    clear(keep)
    with keeping(keep) as kept:
        kept.add_parts("key", np.array([1.5]), 3)
        kept.add_parts("other", np.array([2.5]), 3)
    damaged = (keep / PARTS).read_bytes().replace(b"1.5", b"1.6")
    for name in (PARTS, ROWS):
        (keep / name).write_bytes(damaged)
        with pytest.raises(StoreError, match="is damaged"), keeping(keep):
            pass
        (keep / name).unlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="can't be used"), keeping(tmp_path / "file"):
        pass
