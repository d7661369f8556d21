"""Trace, edit, trace again: both traces in one scale."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from fasttrace_edit_pages import SITE, evaluation, fill, manifest, page_of, text_of

from fasttrace.errors import UsageError
from fasttrace.report.result import Result
from fasttrace.report.retraced import compare


def test_effects_after_are_in_the_scale_of_before(traced):
    before, after = traced
    found = compare(Result(before), Result(after), [SITE])
    assert (found.pairs, found.counted, found.alone) == (6, 6, 0)
    styles = [s for s in found.sites if s.group == "style"]
    assert [s.before.selector for s in styles] == ["EOS", "last subject", "later tokens", "padding"]
    for s in found.sites:
        factor = 0.1 if s.group == "style" else 1.0
        assert s.after.normalised == pytest.approx(factor * s.before.normalised)
        assert s.after.effect == pytest.approx(factor * s.before.effect)
        assert s.change is not None
        assert s.change.value == pytest.approx((factor - 1) * s.before.effect)
        assert s.change.low is None
        assert s.change.prompts == 3
    groups = [name for name, *_ in found.totals]
    assert groups == ["object", "style"]
    _, then, now, change = found.totals[1]
    assert now.value == pytest.approx(then.value / 10)
    assert change.value == pytest.approx(-0.9 * then.value)


def test_both_maps_have_one_colour_limit(traced):
    before, after = traced
    found = compare(Result(before), Result(after), [SITE])
    [(component, chart, _)] = found.maps
    assert component == "UNet"
    bands = [label.text for label in chart.labels if label.role == "group"]
    assert bands == ["object, before", "object, after", "style, before", "style, after"]
    shades = {band: [] for band in bands}
    for cell in chart.cells:
        shades[cell.lines[0].split(":")[0]].append(cell.shade)
    strongest = {band: max(int(s[1:]) for s in own if s[0] == "p") for band, own in shades.items()}
    assert max(strongest.values()) == 31
    assert strongest["object, before"] == strongest["object, after"]
    assert strongest["style, after"] <= 4 < strongest["style, before"]
    for _, (first, second), _ in found.token_maps:
        assert (first.title, second.title) == ("before", "after")
        assert len(first.cells) == len(second.cells)
    marked = [c for _, charts, _ in found.token_maps for t in charts for c in t.cells if c.rank]
    assert len(marked) == 2 * 2 * 4  # groups, before and after, selectors


def test_pairs_that_counted_before_count_after(traced):
    """An edit that leaves nothing to restore gives small effects, not none."""
    before, after = traced
    gone = [replace(r, total_effect=0.0, normalised_effect=None) for r in after]
    found = compare(Result(before), Result(gone), [SITE])
    assert found.counted == 6
    assert all(s.after.prompts == 3 for s in found.sites)
    never = [replace(r, total_effect=0.0) for r in before]
    none = compare(Result(never), Result(after), [SITE])
    assert none.counted == 0
    assert all(s.change is None for s in none.sites)


def test_the_page_shows_both_traces_and_the_site_whichever_way_it_went(traced, tmp_path: Path):
    before, after = traced
    folder = fill(tmp_path, evaluation())
    page = page_of(folder, before=Result(before), after=Result(after))
    words = text_of(page)
    assert "over the 6 of 6 pairs of prompt and seed that counted then" in words
    assert "layer 0, self-attention @ last subject" in words
    assert "total effect: clean minus corrupt style" in words
    assert page.count('<rect class="cell') == 2 * 2 * (70 + 12 * 3 * 4)
    assert 'aria-label="UNet: effect of each site in execution order, before and after' in page
    worse = page_of(folder, before=Result(after), after=Result(before))
    style = re.search(
        r"layer 0, self-attention @ last subject \S+ style .*?\+[\d.]+", text_of(worse)
    )
    assert style is not None
    edit = manifest(sites=["unet.mid_block.attentions.0.transformer_blocks.0.attn2"])
    only_text = [[r for r in side if r.component == "text_encoder"] for side in traced]
    page = page_of(folder, {"ink-to-flat": edit}, before=Result(only_text[0]),
                   after=Result(only_text[1]))  # fmt: skip
    assert "hold no row of an edited site" in page


def test_traces_that_can_not_be_compared_are_refused(traced, tmp_path: Path):
    before, after = traced
    folder = fill(tmp_path, evaluation())
    with pytest.raises(UsageError, match="share no row"):
        page_of(folder, before=Result(before), after=Result([replace(r, seed=9) for r in after]))
    with pytest.raises(UsageError, match="share no row"):
        page_of(folder, before=Result([]), after=Result(after))
    with pytest.raises(UsageError, match="or none of them"):
        page_of(folder, before=Result(before))
    part = compare(Result(before), Result(after[5:]), [SITE])
    assert part.alone == 5
