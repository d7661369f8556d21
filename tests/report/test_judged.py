"""Figures of an evaluation, against shares counted by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fasttrace.report.judged import Figure, figure, judge, mean
from fasttrace.types import Judgement


def row(
    role: str,
    number: int,
    seed: int = 0,
    *,
    expected: dict[str, str] | None = None,
    before: dict[str, str] | None = None,
    after: dict[str, str] | None = None,
    scores: tuple[float, float] = (20.0, 20.0),
    target: tuple[float, float] | None = None,
    attribute: str = "style",
    edit: str = "ink",
    phrase: str = "ink",
) -> Judgement:
    wanted = expected or {}
    return Judgement(
        edit=edit, role=role, phrase=phrase, attribute=attribute, prompt=f"{role} {number}",
        seed=seed, metric="clip_score", before=scores[0], after=scores[1],
        new_before=target and target[0], new_after=target and target[1],
        expected=json.dumps(wanted),
        shown_before=json.dumps(wanted if before is None else before),
        shown_after=json.dumps(wanted if after is None else after),
        picture_before=None, picture_after=None,
    )  # fmt: skip


INK = {"style": "ink", "object": "dog"}
FLAT = {"style": "flat", "object": "cat"}


def by_hand() -> list[Judgement]:
    """Three edited prompts with two seeds, two neighbours, one other."""
    gone, still, broken = {**INK, "style": "flat"}, INK, {"style": "flat", "object": "cow"}
    return [
        row("edited", 0, 0, expected=INK, after=gone),
        row("edited", 0, 1, expected=INK, after=gone),
        row("edited", 1, 0, expected=INK, after=still),
        row("edited", 1, 1, expected=INK, after=gone),
        # It never showed the phrase, and the edit turned its dog into a cow.
        row("edited", 2, 0, expected=INK, before={**INK, "style": "flat"}, after=broken),
        row("edited", 2, 1, expected=INK, after=still),
        row("neighbour", 0, expected=FLAT),
        row("neighbour", 1, expected=FLAT, after={**FLAT, "style": "ink"}),
        row("other", 0, expected={"object": "cat", "style": "flat"}, attribute="object"),
        row("paraphrase", 0, expected=INK, after=gone),
        row("misspelling", 0, expected=INK),
        row("misspelling", 1, expected=INK, after=gone),
    ]


def test_shares_are_those_counted_by_hand():
    [one] = judge(by_hand())
    assert one.edit == "ink"
    assert one.phrases == ("ink",)
    # Prompts: 2 of 2, 1 of 2, 1 of 2 pictures.
    assert one.ua == Figure(pytest.approx(200 / 3), None, None, 3, 6)
    assert one.ira == Figure(50.0, None, None, 2, 2)
    # Objects: 1, 1 and 1/2 of the edited prompts, then 1, 1 and 1: over six prompts.
    assert one.cra is not None
    assert one.cra.value == pytest.approx(100 * 5.5 / 6)
    assert (one.cra.prompts, one.cra.pictures) == (6, 9)
    assert one.paraphrased == Figure(100.0, None, None, 1, 1)
    assert one.misspelt == Figure(50.0, None, None, 2, 2)


def test_the_unedited_models_shares_stand_beside_them():
    [one] = judge(by_hand())
    assert one.before["ua"] == Figure(pytest.approx(100 / 6), None, None, 3, 6)
    values = {name: f and f.value for name, f in one.before.items()}
    assert values["ira"] == 100
    assert values["cra"] == 100
    assert values["paraphrased"] == 0
    assert values["misspelt"] == 0


def test_below_five_units_there_is_no_interval():
    four = [row("neighbour", i, expected=FLAT) for i in range(4)]
    assert judge(four)[0].ira == Figure(100.0, None, None, 4, 4)
    five = [
        row("neighbour", i, expected=FLAT, after=INK if i == 0 else FLAT, scores=(20.0, 20.0 - i))
        for i in range(5)
    ]
    [one] = judge(five)
    # Of five prompts drawn from five the bad one comes 0 to 3 times in 95 of 100 draws.
    assert one.ira == Figure(80.0, 40.0, 100.0, 5, 5)
    change = one.changes["neighbour"]
    assert change.value == -2.0
    assert change.low is not None
    assert change.high is not None
    assert -4 < change.low < -2 < change.high < 0


def test_five_seeds_of_one_prompt_are_units_too():
    rows = [row("edited", 0, s, expected=INK, after=INK if s else FLAT) for s in range(5)]
    ua = judge(rows)[0].ua
    assert ua == Figure(20.0, 0.0, 60.0, 1, 5)
    assert judge(rows[:4])[0].ua == Figure(25.0, None, None, 1, 4)


def test_without_classifiers_only_scores_are_left():
    rows = [
        row("edited", i, scores=(24.0 + i, 20.0 + i), target=(10.0, 16.0 + i)) for i in range(2)
    ]
    rows += [row("other", 0, scores=(22.0, 21.0))]
    [one] = judge(rows)
    assert (one.ua, one.ira, one.cra, one.misspelt, one.paraphrased) == (None,) * 5
    assert set(one.before.values()) == {None}
    assert [f.value for f in one.scores["edited"]] == [24.5, 20.5]
    assert one.changes["edited"].value == -4.0
    assert [f.value for f in one.targets["edited"]] == [10.0, 16.5]
    assert one.target_changes["edited"].value == 6.5
    assert one.changes["other"].value == -1.0
    assert "other" not in one.targets


def test_an_erased_phrase_has_no_target_and_hides_no_other_ones():
    rows = [row("edited", 0, phrase="ink"), row("edited", 1, phrase="flat", target=(1.0, 3.0))]
    [one] = judge(rows)
    assert one.phrases == ("ink", "flat")
    assert one.target_changes["edited"] == Figure(2.0, None, None, 1, 1)


def test_a_score_that_is_no_number_is_left_out_of_both_sides():
    nan = float("nan")
    rows = [row("other", 0, scores=(20.0, 18.0)), row("other", 1, scores=(90.0, nan))]
    [one] = judge(rows)
    assert [f.value for f in one.scores["other"]] == [20.0, 18.0]
    assert one.changes["other"].value == -2.0
    assert judge([replace(rows[1])])[0].changes == {}
    assert figure([("a", 0, nan)]) is None


def test_a_phrase_that_no_classifier_knows_has_no_ua():
    rows = [
        row("edited", 0, expected={"object": "dog"}, attribute=""),
        row("other", 0, expected={"object": "cat"}, attribute="object", after={"object": "cow"}),
    ]
    [one] = judge(rows)
    assert one.ua is None
    assert one.ira is None
    assert one.cra is not None
    assert one.cra.value == 50.0


def test_edits_keep_their_order_and_their_rows():
    rows = [row("edited", i, edit=name) for name in ("b", "a") for i in range(2)]
    assert [j.edit for j in judge(rows)] == ["b", "a"]
    assert judge([]) == []


def test_the_mean_takes_each_edit_once():
    edits = []
    for number in range(5):
        edits += [
            row("edited", i, expected=INK, after=FLAT if i < number else INK, edit=f"e{number}",
                scores=(20.0, 20.0 - number))
            for i in range(4)
        ]  # fmt: skip
    # An edit asked more often weighs no more.
    edits += [row("edited", 9, s, expected=INK, edit="e0") for s in range(20)]
    judged = judge(edits)
    assert [j.ua and j.ua.value for j in judged] == [0, 25, 50, 75, 100]
    whole = mean(judged)
    assert whole.ua is not None
    assert (whole.ua.value, whole.ua.prompts, whole.ua.pictures) == (50.0, 5, 40)
    assert whole.ua.low is not None
    assert 0 < whole.ua.low < 50
    assert whole.ira is None
    assert whole.changes["edited"].value == pytest.approx(-2.0, abs=1e-9)
    assert mean(judged[:4]).ua == Figure(37.5, None, None, 4, 36, "edits")


@pytest.mark.parametrize("number", [1, 3])
def test_seeds_are_averaged_inside_a_prompt_first(number: int):
    values = [("often", s, 0.0) for s in range(9)] + [("seldom", 0, 30.0)] * number
    assert figure(values) == Figure(15.0, None, None, 2, 10)
