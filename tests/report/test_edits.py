"""The page of an evaluation: the numbers, damage first, nothing from data unescaped."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from fasttrace_edit_pages import (
    HOSTILE,
    SITE,
    evaluation,
    fill,
    manifest,
    page_of,
    row,
    text_of,
)

from fasttrace.errors import StoreError
from fasttrace.report.edit_pictures import Album, describe
from fasttrace.report.edit_words import share
from fasttrace.store.judgements import write_judgements


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
    assert "100 % n = 3 prompts, no interval before 100 %" in table  # CRA, of the three others
    assert "100 % n = 3 prompts, no interval before 0 %" in table  # paraphrases
    assert "25 % n = 4 prompts, no interval before 0 %" in table  # misspellings
    assert "-4 [-4, -4] before 24" in table
    assert "+3 [3, 3] before 18" in table  # the target
    assert "-2 [-3.2, -0.8] before 24" in table  # neighbours
    assert "-0.5 n = 3 prompts, no interval before 24" in table  # others
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
        "&#39; --out ink-to-flat\nfasttrace evaluate ink-to-flat --seeds 0,1</pre>"
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
    assert "On average over 25 edits of 1 phrase: 75 % of the pictures" in text_of(page)
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
