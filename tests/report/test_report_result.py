"""`Result`: causal sets, thresholds, pictures, saving and opening."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from fasttrace.errors import StoreError, UsageError
from fasttrace.report.causal import CausalLabel
from fasttrace.report.result import Result


@pytest.fixture(scope="module")
def result(rows, fakes):
    pictures = {}
    for row in rows[:140]:
        pictures |= fakes.fake_pictures(row)
    return Result(rows, pictures)


def test_says_what_it_holds(result, rows):
    assert len(result) == len(rows)
    text = repr(result)
    assert text.startswith(f"Result: {len(rows)} rows (12 prompts, 1 seed, 106 sites)")
    assert "n = 3, no interval" in text
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn2" in text
    assert repr(Result([])) == "Result: no rows"
    assert Result([]).aie() == []


def test_aie_is_in_execution_order(result):
    unet = [e for e in result.aie() if e.component == "unet" and e.group == "object"]
    assert [e.site_index for e in unet] == list(range(70))


def test_the_causal_set_finds_what_was_put_in(result, fakes):
    top = result.where(component="unet").causal(top=3)
    for attribute, parts in fakes.STRENGTHS.items():
        own = [e for e in top if e.group == attribute]
        assert len(own) == 3
        assert all(any(part in e.site for part, _ in parts) for e in own)
        assert [e.effect for e in own] == sorted((e.effect for e in own), reverse=True)


def test_thresholds(result):
    unet = result.where(component="unet", attribute="object")
    assert len(unet.causal()) == 5
    some = unet.causal(threshold=3.0)
    assert all(e.effect >= 3.0 for e in some)
    assert all(e.effect < 3.0 for e in unet.aie() if e.site not in {s.site for s in some})
    assert len(unet.causal(threshold=3.0, top=1)) == 1
    assert all(e.normalised >= 0.4 for e in unet.causal(threshold=0.4, scale="normalised"))
    with pytest.raises(UsageError, match="scale 'hat' is unknown"):
        unet.causal(scale="hat")


def test_causal_sites_are_in_the_order_of_the_share_that_is_shown(rows):
    """A site traced in one prompt alone: the smaller effect, but the larger share."""
    base = replace(rows[0], total_effect=20.0, effect=10.0)
    small = replace(rows[0], prompt="q", key="q", total_effect=4.0, effect=3.0)
    sites = [base, replace(small, site="unet.b", site_index=1, key="b")]
    assert [e.site for e in Result(sites).causal(minimum=0.0)] == ["unet.b", rows[0].site]


def test_at_least_one_site_is_asked_for(result):
    for top in (0, -1):
        with pytest.raises(UsageError, match=f"top = {top} leaves no site"):
            result.causal(top=top)


def test_site_effects_print_as_a_table(result):
    lines = repr(result.aie()).splitlines()
    assert lines[0].split() == ["group", "site", "effect", "of", "total", "95", "%", "chance"]
    assert len(lines) == 1 + len(result.aie())
    assert sum("not run: unreachable" in line for line in lines) == 4 * 3
    assert repr(result.causal(threshold=1e9)) == "[]"


def test_why_there_is_no_causal_site(rows):
    """A corruption that changed nothing is told from sites that restore nothing."""
    failed = [replace(r, total_effect=0.0, effect=0.0, normalised_effect=None) for r in rows]
    assert "did not clearly worsen the score in any pair" in repr(Result(failed))
    weak = [replace(r, effect=0.0) for r in rows]
    assert "none is above the noise floor" in repr(Result(weak))


def test_damaged_pictures_give_one_line(result, tmp_path: Path, caplog):
    out = Result(result.rows[:20], result._pictures).save(tmp_path / "out")
    damaged = sorted((out / "pictures").glob("*.png"))[:7]
    for path in damaged:
        path.write_bytes(b"not a picture")
    again = Result.open(out)
    with caplog.at_level("WARNING"):
        again.save(tmp_path / "copy")
    (line,) = caplog.messages
    assert "without 7 damaged pictures" in line
    assert any(path.name in line for path in damaged)


def test_sites_in_the_noise_are_never_causal(rows):
    noisy = Result([replace(r, noise_floor=1e6) for r in rows])
    assert noisy.causal(top=5, minimum=0.0) == []
    unrun = [e for e in Result(rows).aie() if e.status != "run"]
    assert unrun
    assert not {(e.site, e.selector) for e in Result(rows).causal(top=10_000)} & {
        (e.site, e.selector) for e in unrun
    }


def test_a_threshold_fitted_on_labels_is_the_lowest_mean_of_fully_causal_sites(rows, fakes):
    """Site a: causal in both prompts, effects 4 and 2, mean 3. Site b: mean 5, but one 'no'."""
    first = rows[0]

    def row(site, prompt, effect):
        return replace(
            first, key=f"{site}{prompt}", site=site, prompt=prompt, effect=effect, score=effect,
            total_effect=8.0, selector="all",
        )  # fmt: skip

    table = [row("a", "p", 4.0), row("a", "q", 2.0), row("b", "p", 9.0), row("b", "q", 1.0)]
    table += [row("c", "p", 3.5), row("c", "q", 3.5)]
    labels = [
        CausalLabel("p", "a", True), CausalLabel("q", "a", True),
        CausalLabel("p", "b", True), CausalLabel("q", "b", False),
    ]  # fmt: skip
    found = Result(table).causal(validation=labels)
    assert {e.site for e in found} == {"a", "b", "c"}
    labels[1] = CausalLabel("q", "a", False)
    labels[3] = CausalLabel("q", "b", True)
    assert {e.site for e in Result(table).causal(validation=labels)} == {"b"}
    with pytest.raises(UsageError, match="no site of the validation set is judged causal"):
        Result(table).causal(validation=[CausalLabel("p", "a", False)])
    with pytest.raises(UsageError, match="holds? no such row"):
        Result(table).causal(validation=[CausalLabel("z", "a", True)])
    with pytest.raises(UsageError, match="not both"):
        Result(table).causal(threshold=1.0, validation=labels)


def test_pictures_of_each_pair(result, fakes):
    pairs = result.where(component="unet").pictures(limit=2)
    assert len(pairs) == 2
    row, image = pairs[0].best["unet"]
    assert row.effect == max(r.effect for r in result.rows[:70])
    assert image is not None
    clean = np.asarray(pairs[0].clean, np.float32).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(clean, fakes.fake_picture(row, 1.0), atol=0.5 / 255 + 1e-6)
    assert result.pictures()[-1].clean is None


def test_saved_and_opened(result, tmp_path: Path):
    some = Result(result.rows[:90], result._pictures)
    again = Result.open(some.save(tmp_path / "out"))
    assert sorted(again.rows, key=lambda r: r.key) == sorted(some.rows, key=lambda r: r.key)
    name = some.rows[0].picture
    assert again.picture(name).tobytes() == some.picture(name).tobytes()
    assert again.to_arrow().num_rows == 90
    moved = Result.open(again.save(tmp_path / "copy"))
    assert moved.picture(name).tobytes() == some.picture(name).tobytes()
    other = Result([replace(r, fingerprint="0" * 64, key=r.key + "x") for r in some.rows])
    with pytest.raises(StoreError, match="was made with fingerprint="):
        other.save(tmp_path / "out")
    with pytest.raises(UsageError, match="no rows to save"):
        Result([]).save(tmp_path / "empty")
    with pytest.raises(StoreError, match="holds no results"):
        Result.open(tmp_path / "nowhere")


def test_where_names_unknown_columns(result):
    with pytest.raises(UsageError, match="no column 'colour'"):
        result.where(colour="blue")


def test_heatmap(result, tmp_path: Path):
    figure = result.heatmap(tmp_path / "map.png")
    assert isinstance(figure, Figure)
    assert (tmp_path / "map.png").stat().st_size > 10_000
    unet = next(axes for axes in figure.axes if axes.get_title("left").startswith("UNet"))
    assert unet.images[0].get_array().shape == (4, 70)
    with pytest.raises(StoreError, match="can't be written"):
        result.where(component="unet").heatmap(tmp_path / "no" / "such.png")
    with pytest.raises(UsageError, match="no rows to draw"):
        Result([]).heatmap()


def test_the_example_in_the_documents_runs(result, tmp_path: Path, monkeypatch):
    result.save(tmp_path / "out")
    text = (Path(__file__).parents[2] / "docs" / "results.md").read_text()
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert names["means"].num_rows == len(result.where(status="run").aie())
