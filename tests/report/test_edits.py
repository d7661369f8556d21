"""The page of an evaluation: the numbers, damage first, nothing from data unescaped."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fasttrace.errors import StoreError, UsageError
from fasttrace.report.edit_pictures import Album, describe
from fasttrace.report.edit_words import share
from fasttrace.report.edits import PathPoint, write_edits_report
from fasttrace.report.judged import judge
from fasttrace.report.lambda_path import path_chart
from fasttrace.report.result import Result
from fasttrace.report.retraced import compare
from fasttrace.store.judgements import write_judgements
from fasttrace.store.pictures import save_picture
from fasttrace.types import Judgement

HOSTILE = '<script>alert("x")</script> & \'"><img src=https://evil.example/x onerror=alert(1)>'
SITE = "text_encoder.layers.0.self_attn"


def manifest(old: str = "ink", new: str | Sequence[str] = "flat", **values: Any) -> dict[str, Any]:
    news = [new] if isinstance(new, str) else list(new)
    pair = {"old": old, "new": news, "strength": 1.0, "shares": [1 / len(news)] * len(news)}
    return {
        "schema": 1, "model": "embedded", "method": "diffquickfix", "source": "Basu et al.",
        "sites": [SITE], "lam": 0.01, "tokens": "last_to_end", "templates": ["{}", "a photo of {}"],
        "pairs": [pair],
        "bias": "exact", "preserve": [], "preserve_weight": 1.0, "dtype": "float32", "after": [],
        "base": {f"{SITE}.out_proj": "ab" * 32},
        "versions": {"torch": "2.13.0", "fasttrace": "0.1.0"},
    } | values  # fmt: skip


def row(role: str, number: int, seed: int = 0, *, edit: str = "ink-to-flat", after: str = "",
        classes: bool = True, fall: float = 0.0, prompt: str = "") -> Judgement:  # fmt: skip
    """A style's picture that shows what it should before, and `after` (or the same) afterwards."""
    changed = role in ("edited", "paraphrase", "misspelling")
    wanted = "ink" if changed else "cartoon"
    attribute = "object" if role == "other" else "style"
    prompt = prompt or f"{role} dog {number} in {wanted} style"
    names = [hashlib.sha256(f"{edit * i}{prompt}{seed}".encode()).hexdigest()[:24] for i in (0, 1)]
    shown = [
        json.dumps({attribute: s} if classes else {}) for s in (wanted, wanted, after or wanted)
    ]
    return Judgement(
        edit=edit, role=role, phrase="ink" if changed else "cartoon",
        attribute=attribute, prompt=prompt, seed=seed,
        metric="clip_score", before=24.0, after=24.0 - fall, new_before=18.0 if changed else None,
        new_after=21.0 if changed else None, expected=shown[0], shown_before=shown[1],
        shown_after=shown[2], picture_before=names[0], picture_after=names[1],
    )  # fmt: skip


def evaluation(edit: str = "ink-to-flat", classes: bool = True) -> list[Judgement]:
    """UA 75 % of 6 prompts, IRA 80 % of 5, CRA 100 % of 3."""
    kept = {"edit": edit, "classes": classes}
    rows = [
        row("edited", i, s, after="flat" if i < 3 or s else "", fall=4.0, **kept)
        for i in range(6)
        for s in (0, 1)
    ]
    rows += [row("paraphrase", i, after="flat", **kept) for i in range(3)]
    rows += [row("misspelling", i, after="" if i else "flat", **kept) for i in range(4)]
    rows += [row("neighbour", i, after="flat" if i == 3 else "", fall=i, **kept) for i in range(5)]
    rows += [row("other", i, fall=0.5 * i, **kept) for i in range(3)]
    return rows


def fill(folder: Path, rows: Sequence[Judgement], size: int = 8) -> Path:
    write_judgements(folder, rows)
    (folder / "pictures").mkdir(exist_ok=True)
    for r in rows:
        for name in (r.picture_before, r.picture_after):
            assert name is not None
            colour = [int(name[i : i + 2], 16) / 255 for i in (0, 2, 4)]
            picture = np.broadcast_to(np.array(colour)[:, None, None], (3, size, size))
            save_picture(folder / "pictures", name, picture)
    return folder


def page_of(folder: Path, edits: dict[str, Any] | None = None, **values: Any) -> str:
    path = write_edits_report(folder, {"ink-to-flat": manifest()} if edits is None else edits,
                              **values)  # fmt: skip
    assert path == folder / "report.html"
    return path.read_text()


def text_of(page: str) -> str:
    page = re.sub(r"<(style|script)>.*?</\1>", " ", page, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page).replace("\u00a0", " "))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(fill(tmp_path_factory.mktemp("one"), evaluation()))


def test_the_headline_says_what_was_rewritten_and_how_it_went(page: str):
    assert "<h1>“ink” rewritten as “flat”</h1>" in page
    assert (
        "75 % of the pictures asked for “ink” no longer show it (0 % before the edit); 80 % of its "
        "neighbours and 100 % of everything else still show what was asked for (100 % and 100 % "
        "before)."
    ) in text_of(page)


def test_the_table_has_every_share_with_interval_or_n_and_what_it_was_before(page: str):
    table = text_of(page[page.index('<table class="judged all">') :].split("</table>")[0])
    assert "75 % [58, 92] % before 0 %" in table
    assert "80 % [40, 100] % before 100 %" in table
    assert "100 % n = 3, no interval before 100 %" in table  # CRA, of the three others
    assert "100 % n = 3, no interval before 0 %" in table  # paraphrases
    assert "25 % n = 4, no interval before 0 %" in table  # misspellings
    assert "-4 [-4, -4] before 24" in table
    assert "+3 [3, 3] before 18" in table  # the target
    assert "-2 [-3.2, -0.8] before 24" in table  # neighbours
    assert "-0.5 n = 3, no interval before 24" in table  # others
    assert table.count("ink-to-flat") == 1
    assert "mean of" not in table


def test_every_section_is_there(page: str):
    words = text_of(page)
    for part in (
        "Model: embedded . Method: diffquickfix, in closed form", "In short",
        "Before and after", "How far to trust it", "How to repeat it",
        "As in UnlearnCanvas", "know its own small world alone", "What was not asked",
        "torch 2.13.0, fasttrace 0.1.0", "judgements.parquet", "lam 0.01", "{} | a photo of {}",
    ):  # fmt: skip
        assert part in words, part
    assert "Along lambda" not in words
    assert "Traced again" not in words
    assert f"{'ab' * 32}  {SITE}.out_proj" in page


def test_it_says_how_to_load_and_make_the_edit(page: str):
    assert (
        "pipe = fasttrace.load(&#34;embedded&#34;)\n"
        "with fasttrace.load_edit(&#34;ink-to-flat&#34;).applied(pipe):\n"
        "    pipe(&#34;ink&#34;).images[0].save(&#34;edited.png&#34;)\n"
    ) in page
    assert (
        "fasttrace edit embedded --pair ink=flat --method diffquickfix --tokens last_to_end --bias "
        f"exact --lam 0.01 --site {SITE} --template &#39;{{}}&#39; --template &#39;a photo of {{}}"
        "&#39; --out ink-to-flat\nfasttrace evaluate ink-to-flat</pre>"
    ) in page
    assert "pairs.json" not in page


def test_needs_no_network_and_no_file(page: str):
    assert not re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?(?!#|data:|\$)[^\"')\s]+", page)
    assert "http:" not in page
    assert "https:" not in page
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page


def test_what_should_not_have_changed_begins_with_the_worst(page: str):
    group = page[page.index("<h4>Neighbours") :].split("<h4>")[1]
    shown = re.findall(r"<figcaption><b>neighbour dog (\d)", group)
    assert shown == ["3", "4", "2", "1", "0"]  # 3 lost its class; the rest by how far scores fell
    assert group.count('<figure class="bad">') == 1
    assert "style: cartoon, now flat" in group
    assert re.findall(r"<b>other dog (\d)", page) == ["2", "1", "0"]


def test_a_picture_without_a_score_counts_as_damage(tmp_path: Path):
    rows = [row("other", i, fall=i, classes=False) for i in range(3)]
    rows[1] = replace(rows[1], after=float("nan"))
    page = page_of(fill(tmp_path, [row("edited", 0, classes=False), *rows]))
    assert re.findall(r"<b>other dog (\d)", page) == ["1", "2", "0"]


def test_pictures_where_the_edit_failed_are_marked(page: str):
    group = page[page.index("<h4>Edited") :].split("<h4>")[1]
    assert group.count("still shows ink") == 3
    assert group.count('<figure class="bad">') == 3


def test_damage_beside_the_edited_attribute_is_marked_too():
    both = {"style": "ink", "object": "dog"}
    given = replace(row("edited", 0), expected=json.dumps(both), shown_before=json.dumps(both))
    clean = replace(given, shown_after=json.dumps({"style": "flat", "object": "dog"}))
    broken = replace(given, shown_after=json.dumps({"style": "flat", "object": "cow"}))
    assert describe(clean) == ("style: ink, now flat", False)
    assert describe(broken) == ("style: ink, now flat; object: dog, now cow", True)


def test_at_most_twelve_pairs_a_group_and_the_rest_counted(tmp_path: Path):
    rows = [row("neighbour", i, fall=i % 7) for i in range(30)] + [row("edited", 0)]
    page = page_of(fill(tmp_path, rows))
    assert "12 of 30 pairs, the worst first" in text_of(page)
    assert len(re.findall(r"<b>neighbour dog", page)) == 12
    falls = [int(n) % 7 for n in re.findall(r"<b>neighbour dog (\d+)", page)]
    assert falls == [6] * 4 + [5] * 4 + [4] * 4


def test_pictures_have_words_and_tables_have_headings(page: str):
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) == 12 + 3 + 4 + 5 + 3
    assert all(re.search(r'alt="[^"]+, seed \d: unedited above, edited below"', i) for i in images)
    assert page.count("<h1") == 1
    levels = [int(n) for n in re.findall(r"<h(\d)", page)]
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert all('scope="col"' in t for t in re.findall(r"<thead>.*?</thead>", page, re.S))


def test_the_unedited_picture_is_above_the_edited_one(tmp_path: Path):
    folder = fill(tmp_path, [row("edited", 0)], size=4)
    [group] = Album(folder / "pictures", many=False).groups([row("edited", 0)])
    import base64
    import io

    from PIL import Image

    whole = group.pairs[0].whole
    assert whole is not None
    image = Image.open(io.BytesIO(base64.b64decode(whole.split(",")[1]))).convert("RGB")
    assert image.size == (4, 8)
    names = (group.pairs[0].row.picture_before, group.pairs[0].row.picture_after)
    for name, y in zip(names, (1, 6), strict=True):
        assert name is not None
        assert image.getpixel((1, y)) == tuple(bytes.fromhex(name[:6]))


def test_hostile_text_stays_text(tmp_path: Path):
    shown = json.dumps({HOSTILE: HOSTILE})
    rows = [
        replace(r, edit=HOSTILE, prompt=HOSTILE, phrase=HOSTILE, metric=HOSTILE, attribute=HOSTILE,
                expected=shown, shown_before=shown,
                shown_after=json.dumps({HOSTILE: "</title><script>"}))
        for r in evaluation()
    ]  # fmt: skip
    bad = manifest(HOSTILE, HOSTILE, model=HOSTILE, method=HOSTILE, versions={HOSTILE: HOSTILE},
                   base={HOSTILE: HOSTILE}, templates=[HOSTILE], preserve=[HOSTILE],
                   after=[manifest(HOSTILE)])  # fmt: skip
    page = page_of(fill(tmp_path, rows), {HOSTILE: bad, f"second {HOSTILE}": bad})
    assert "<script>alert" not in page
    assert "<img src=https" not in page
    assert "</title><script>" not in page
    assert page.count("<script>") == 1
    assert "&lt;script&gt;alert" in page


def test_missing_and_damaged_pictures_leave_a_place_and_one_line(tmp_path: Path, caplog):
    folder = fill(tmp_path, evaluation())
    files = {path.stem: path for path in (folder / "pictures").glob("*.png")}
    first, second, third = evaluation()[:3]
    files[str(first.picture_after)].unlink()
    files[str(second.picture_before)].write_bytes(b"not a picture")
    files[str(third.picture_before)].write_bytes(files[str(third.picture_before)].read_bytes()[:50])
    page = page_of(folder)
    assert "3 pictures of this page are missing or damaged. The numbers don" in text_of(page)
    assert page.count("edited: no picture") == 3
    assert page.count("unedited: no picture") == 2
    assert page.count("<img ") == 27
    (line,) = caplog.messages
    assert "without 2 damaged pictures" in line


def test_a_table_that_names_a_path_as_a_picture_is_refused(tmp_path: Path):
    write_judgements(tmp_path, [replace(row("edited", 0), picture_after="../../etc/passwd")])
    with pytest.raises(StoreError, match="is no picture name"):
        page_of(tmp_path)


def test_without_classifiers_scores_speak(tmp_path: Path):
    page = page_of(fill(tmp_path, evaluation(classes=False)))
    words = text_of(page)
    assert (
        "The score of pictures asked for “ink” fell by 4; their score as the new meaning rose by "
        "3; the score of its neighbours fell by 2; the score of everything else fell by 0.5."
    ) in words
    assert "This model brings none, so there is no UA, IRA or CRA" in words
    assert "UnlearnCanvas" not in words
    table = text_of(page[page.index('<table class="judged all">') :].split("</table>")[0])
    assert "UA" not in table
    assert "paraphrases as asked for" in table
    assert "misspellings as asked for" in table


def test_twenty_five_edits_stay_readable(tmp_path: Path):
    names = [f"edit-{i:02}" for i in range(25)]
    rows = [r for name in names for r in evaluation(name)]
    page = page_of(fill(tmp_path, rows), {name: manifest() for name in names})
    assert "<h1>25 edits, 1 phrase rewritten</h1>" in page
    assert "On average over 25 edits: 75 % of the pictures" in text_of(page)
    lines = re.findall(r"<tr[^>]*><th scope=\"row\">(.*?)</th>", page.split("</table>")[0])
    assert lines[0] == "mean of 25 edits"
    assert lines[1] == '<a href="#edit-1">edit-00</a>'
    assert len(lines) == 26
    assert page.count('<details class="edit" id=') == 25
    assert "<details open" not in page
    assert not re.search(r"<details[^>]* open", page)
    assert page.index("</table>") < page.index("<img ")
    # Fewer pictures of each: 6 edited, 3 paraphrases, 4 misspellings, 5 neighbours, 3 others.
    assert page.count("<img ") == 25 * (6 + 3 + 4 + 5 + 3)
    assert 'class="sub"' not in page
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(re.findall(r'id="([^"]+)"', page))


def test_edits_without_a_manifest_and_manifests_without_pictures_are_named(tmp_path: Path):
    page = page_of(fill(tmp_path, evaluation()), {"other": manifest()})
    assert "Made, but not judged: other." in page
    assert "Its manifest was not at hand" in page
    assert "<h1>“ink” rewritten</h1>" in page


def test_what_a_command_line_can_not_say_becomes_a_file(tmp_path: Path):
    debias = manifest("a doctor", ["a woman doctor", "a man doctor"], after=[manifest()])
    page = page_of(fill(tmp_path, evaluation()), {"ink-to-flat": debias})
    assert "“a doctor” rewritten as the mean of “a woman doctor” and “a man doctor”" in page
    assert "fasttrace edit embedded --pairs pairs.json" in page
    assert "--after EARLIER" in page
    pairs = re.search(r"&lt;&lt;&#39;END&#39;|&lt;&lt;'END'\n(.*?)\nEND", page, re.S)
    assert pairs is not None
    found = json.loads(pairs[1].replace("&#34;", '"'))
    assert found == {
        "schema": 1,
        "pairs": [{"old": "a doctor", "new": ["a woman doctor", "a man doctor"]}],
    }


def test_an_erased_phrase_reads_as_nothing(tmp_path: Path):
    page = page_of(fill(tmp_path, evaluation()), {"ink-to-flat": manifest("ink", "")})
    assert "“ink” rewritten as nothing (the empty prompt)" in page
    assert "--pair ink= --method" in page


def test_shares_that_are_not_all_do_not_read_as_all():
    assert share(100.0) == "100 %"
    assert share(99.999999999) == "100 %"  # the last bits of a mean
    assert share(99.7) == "99.7 %"
    assert share(99.97) == "99.9 %"
    assert share(0.2) == "0.2 %"
    assert share(0.01) == "0.1 %"
    assert share(0.0) == "0 %"
    assert share(66.6) == "67 %"


# Trace, edit, trace again.


@pytest.fixture(scope="module")
def traced(rows):
    """Style and object, three prompts each; after the edit a tenth of the style is left."""
    before = [r for r in rows if r.attribute in ("style", "object")]
    after = [
        replace(r, effect=r.effect / 10, total_effect=r.total_effect / 10, noise_floor=3e-4)
        if r.attribute == "style"
        else r
        for r in before
    ]
    return before, after


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


# Along lambda.


def path_of(classes: bool = True) -> list[PathPoint]:
    points = []
    for lam, gone in ((10.0, 0), (1e-4, 6), (0.01, 3)):
        rows = [
            row("edited", i, after="flat" if i < gone else "", classes=classes, fall=gone)
            for i in range(6)
        ]
        points.append(PathPoint(lam, judge(rows)[0]))
    return points


def test_a_path_is_drawn_in_order_over_log_lambda():
    chart = path_chart([(p.lam, p.figures) for p in path_of()], 0.01)
    assert chart is not None
    assert chart.lams == [1e-4, 0.01, 10.0]
    [ua] = chart.series
    assert ua.name == "UA"
    assert [p.figure.value for p in ua.points] == [100, 50, 0]
    a, b, c = (p.x for p in ua.points)
    assert (b - a) / (c - b) == pytest.approx(2 / 3)  # two decades, then three
    assert chart.chosen == b
    assert [p.y for p in ua.points] == pytest.approx(
        [chart.top, (chart.top + chart.bottom) / 2, chart.bottom]
    )
    assert [text for _, text in chart.ys] == ["0 %", "25 %", "50 %", "75 %", "100 %"]


def test_a_path_without_classifiers_draws_score_changes():
    chart = path_chart([(p.lam, p.figures) for p in path_of(classes=False)])
    assert chart is not None
    assert not chart.shares
    assert [s.name for s in chart.series] == ["phrase", "target"]
    assert [p.figure.value for p in chart.series[0].points] == [-6, -3, 0]
    ends = [float(text) for _, text in chart.ys]
    assert ends[0] <= -6
    assert ends[-1] >= 3
    assert chart.chosen is None


def test_lambda_zero_and_a_single_lambda_have_a_place():
    figures = path_of()[0].figures
    chart = path_chart([(0.0, figures), (0.1, figures), (1.0, figures)])
    assert chart is not None
    xs = [x for x, _ in chart.xs]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1])
    assert path_chart([(0.0, figures)]) is not None
    assert path_chart([]) is None


def test_names_at_the_lines_ends_do_not_overlap():
    [one] = judge(evaluation())
    chart = path_chart([(0.1, one), (1.0, replace(one, ua=one.ira, cra=one.ira))])
    assert chart is not None
    places = sorted(s.label_y for s in chart.series)
    assert len(places) == 3
    assert all(b - a >= 14 for a, b in pairwise(places))


def test_the_page_draws_the_path_and_gives_it_as_a_table(tmp_path: Path):
    page = page_of(fill(tmp_path, evaluation()), path=path_of())
    assert page.count("<polyline") == 1
    assert 'aria-label="UA, IRA and CRA by lambda' in page
    assert "lambda UA 0.0001 100 % [100, 100] % 0.01 50 % [17, 83] % 10 0 % [0, 0] %" in text_of(
        page
    )


# The disk.


def test_no_evaluation_a_damaged_and_an_empty_one_are_sentences(tmp_path: Path):
    with pytest.raises(StoreError, match="holds no evaluation"):
        page_of(tmp_path)
    (tmp_path / "judgements.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(StoreError, match="is damaged"):
        page_of(tmp_path)
    write_judgements(tmp_path, [])
    with pytest.raises(StoreError, match="without a single picture"):
        page_of(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_read_only_folder_is_a_sentence_and_keeps_the_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = fill(tmp_path, evaluation())
    old = page_of(folder)
    opened = os.open

    def refuse(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, flags, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("fasttrace.store.disk.os.open", refuse)
        with pytest.raises(
            StoreError, match=r"report.html can't be used \(Read-only file system\)"
        ):
            page_of(folder)
    assert (folder / "report.html").read_text() == old
    assert not list(folder.glob(".fasttrace*"))


# A browser.


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("no Chromium on this machine: the page was not looked at in a browser")
    return found


@pytest.mark.browser
def test_nothing_is_cut_off_and_a_link_opens_its_edit(chromium: str, traced, tmp_path: Path):
    names = [f"an edit with a rather long name {i}" for i in range(2)]
    rows = [replace(r, before=r.before + 0.123, after=r.after - 0.0123 * i)
            for name in names for i, r in enumerate(evaluation(name))]  # fmt: skip
    page = page_of(fill(tmp_path, rows), {n: manifest("x" * 90) for n in names}, path=path_of(),
                   before=Result(traced[0]), after=Result(traced[1]))  # fmt: skip
    measure = """<script>addEventListener("load", () => {
    const cut = [];
    for (const box of document.querySelectorAll(".scroll"))
        if (box.scrollWidth > box.clientWidth) cut.push(box.textContent.slice(0, 30));
    document.body.dataset.cut = JSON.stringify(cut);
    document.body.dataset.over = document.documentElement.scrollWidth - innerWidth;
    location.hash = "edit-2";
    addEventListener("hashchange", () => {
        document.body.dataset.open = document.getElementById("edit-2").open
            && !document.getElementById("edit-1").open;
    });
    });</script></body>"""
    (tmp_path / "report.html").write_text(page.replace("</body>", measure))
    for width in (1280, 1400):
        done = subprocess.run(
            [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
             "--no-first-run", "--disable-background-networking", "--disable-component-update",
             "--disable-sync", "--virtual-time-budget=3000", f"--window-size={width},1000",
             f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
             (tmp_path / "report.html").as_uri()],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert 'data-cut="[]"' in done.stdout, re.search(r'data-cut="[^"]*"', done.stdout)
        assert int(re.search(r'data-over="(-?\d+)"', done.stdout)[1]) <= 0
        assert 'data-open="true"' in done.stdout
