"""Evaluations in words: over what a mean is, and where the judges disagree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from fasttrace_edit_pages import evaluation, fill, manifest, page_of, row, text_of

from fasttrace.report.edit_manifest import Origin
from fasttrace.report.edit_words import disagreements, interval, sentence
from fasttrace.report.edits import MOST_REMARKS
from fasttrace.report.judged import Figure, judge, mean
from fasttrace.types import Judgement


def asked(
    role: str, gone: int, fall: float, of: int = 6, edit: str = "ink-to-flat"
) -> list[Judgement]:
    """`gone` of so many prompts no longer show the phrase; the score falls by `fall` in each."""
    return [row(role, i, after="flat" if i < gone else "", fall=fall, edit=edit) for i in range(of)]


class TestDisagreements:
    @pytest.mark.parametrize("fall", [0.0, -2.0])
    @pytest.mark.parametrize(
        ("role", "words"),
        [
            ("edited", "the edited phrase"),
            ("paraphrase", "paraphrases"),
            ("misspelling", "misspellings"),
        ],
    )
    def test_gone_but_the_score_did_not_fall(self, role, words, fall):
        [judged] = judge(asked(role, 5, fall))
        [said] = disagreements(judged)
        assert said.startswith(f"{words}: by the classifiers 83 % of the pictures no longer show")
        assert "(0 % before), but the score as the prompt says did not clearly fall (" in said

    def test_the_score_fell_but_it_is_still_there(self):
        [judged] = judge(asked("edited", 0, 3.0))
        [said] = disagreements(judged)
        assert said == (
            "the edited phrase: the score as the prompt says fell (-3, [-3, -3]), but by the "
            "classifiers 0 % of the pictures no longer show it (0 % before)"
        )

    @pytest.mark.parametrize(("gone", "fall"), [(6, 4.0), (0, 0.0), (0, -1.0), (2, 1.0), (2, 0.0)])
    def test_where_they_agree_or_neither_is_sure_nothing_is_said(self, gone, fall):
        [judged] = judge(asked("edited", gone, fall))
        assert disagreements(judged) == []

    def test_what_the_unedited_model_never_showed_is_not_gone(self):
        rows = [replace(r, shown_before=r.shown_after) for r in asked("edited", 6, 0.0)]
        assert disagreements(judge(rows)[0]) == []

    def test_without_classifiers_there_is_nothing_to_disagree_with(self):
        rows = [row("edited", i, classes=False) for i in range(6)]
        assert disagreements(judge(rows)[0]) == []

    def test_the_page_says_so_and_which_edit(self, tmp_path: Path):
        rows = asked("edited", 6, 0.0) + asked("edited", 6, 4.0, edit="fine")
        page = page_of(fill(tmp_path, rows), {n: manifest() for n in ("ink-to-flat", "fine")})
        words = text_of(page)
        assert "The judges disagree, so look at the pictures: ink-to-flat, the edited" in words
        assert page.count("did not clearly fall") == 1

    def test_the_page_without_any_says_nothing(self, tmp_path: Path):
        page = page_of(fill(tmp_path, asked("edited", 6, 4.0)))
        assert "The judges disagree" not in page

    def test_many_are_counted(self, tmp_path: Path):
        names = [f"e{i}" for i in range(MOST_REMARKS + 3)]
        rows = [r for name in names for r in asked("edited", 6, 0.0, of=2, edit=name)]
        page = page_of(fill(tmp_path, rows), {name: manifest() for name in names})
        assert page.count("did not clearly fall") == MOST_REMARKS
        assert "and 3 more" in text_of(page)


class TestOverWhatAMeanIs:
    def test_how_many_edits_were_asked_it(self):
        """Two edits have neighbours, one has not."""
        rows = asked("edited", 6, 4.0, edit="a") + asked("neighbour", 0, 0.0, of=3, edit="a")
        rows += asked("edited", 3, 4.0, of=4, edit="b") + asked("neighbour", 1, 0.0, of=4, edit="b")
        rows += asked("edited", 0, 0.0, of=2, edit="c")
        judged = judge(rows)
        said = sentence(mean(judged), len(judged))
        assert said == (
            "On average over 3 edits of 1 phrase: 58 % of the pictures asked for “ink” no longer "
            "show it (0 % before the edit; 3 edits, 12 pictures); 88 % of its neighbours (2 of 3 "
            "edits, 7 pictures) still show what was asked for (100 % before)."
        )

    def test_scores_too(self):
        rows = [
            row("edited", i, classes=False, fall=2.0, edit=name) for name in "ab" for i in range(3)
        ]
        judged = judge(rows)
        said = sentence(mean(judged), len(judged))
        assert "fell by 2 (2 edits, 6 pictures)" in said
        assert "rose by 3 (2 edits, 6 pictures)" in said

    def test_one_edit_needs_no_count(self):
        [judged] = judge(asked("edited", 6, 4.0))
        assert "edits" not in sentence(judged, 1)

    def test_an_interval_that_is_none_says_of_what_it_lacks(self):
        assert interval(Figure(1.0, None, None, 1, 9)) == "n = 1 prompt, no interval"
        assert interval(Figure(1.0, None, None, 4, 9)) == "n = 4 prompts, no interval"
        assert interval(Figure(1.0, None, None, 3, 9, "edits")) == "n = 3 edits, no interval"


class TestOrigin:
    def test_the_whole_command_and_how_was_judged(self, tmp_path: Path):
        command = "fasttrace evaluate 'my edits/ink' --seeds 0,1 --steps 20 --guidance 7.5"
        origin = Origin(
            command, {"steps": "20", "captions": "<mine>"}, {"ink-to-flat": "my edits/ink"}
        )
        page = page_of(fill(tmp_path, evaluation()), origin=origin)
        part = page[page.index('<h2 id="repeat">') :]
        assert f"<pre>{command}</pre>".replace("'", "&#39;") in part
        words = text_of(part)
        assert "steps 20" in words
        assert "captions <mine>" not in part
        assert "load_edit(&#34;my edits/ink&#34;)" in part
        assert "--out &#39;my edits/ink&#39;</pre>" in part
        assert part.count("fasttrace evaluate") == 1  # the command alone: no second, shorter one

    def test_without_one_an_edit_says_how_to_judge_it(self, tmp_path: Path):
        page = page_of(fill(tmp_path, evaluation()))
        part = page[page.index('<h2 id="repeat">') :]
        assert "fasttrace evaluate ink-to-flat --seeds 0,1</pre>" in part
        assert "This page, with its judgements" not in part
