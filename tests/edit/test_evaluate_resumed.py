"""A run that was stopped goes on with what an undisturbed one makes, to the last bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fasttrace.edit import batches as batches_module
from fasttrace.edit.batches import Subject, batches
from fasttrace.edit.editor import Editor
from fasttrace.edit.evaluate import Evaluator
from fasttrace.edit.generate import of_unet
from fasttrace.edit.questions import Question
from fasttrace.errors import UsageError
from fasttrace.store.evaluation import unit_of
from fasttrace.testing.tiny import tiny_pipeline
from fasttrace.types import Metric, Sampling

PROMPTS = [f"a {colour} {thing}" for thing in ("dog", "car", "house") for colour in ("red", "blue")]
SEEDS = [0, 9]


def brightness(pictures, context):
    return pictures.mean((1, 2, 3))


METRIC = Metric("brightness", "brightness", brightness)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("sd", seed=3)


@pytest.fixture(scope="module")
def subjects(pipe) -> list[Subject]:
    """Two of the text encoder, one of them asked less, and one of the UNet."""
    editor = Editor(pipe)
    asked = tuple(Question("other", p, "dog", "object") for p in PROMPTS)
    return [
        Subject("one", editor.edit([("dog", "cat")], tokens="last"), asked),
        Subject("two", editor.edit([("car", "house")], tokens="last"), asked[1:4]),
        Subject("three", editor.edit([("dog", "cat")], method="uce"), asked[:5]),
    ]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "MOST", 9)
    monkeypatch.setattr(batches_module, "LEAST", 9)


def evaluator(pipe) -> Evaluator:
    return Evaluator.of(pipe, METRIC, steps=2)


def test_batches_hold_every_place_once_and_few_pictures(subjects, small):
    sampling = Sampling(2, 7.5, 64, 64)
    found = batches(subjects, SEEDS, sampling)
    places = [place for batch in found for place in batch.places]
    assert places == [(prompt, seed) for seed in SEEDS for prompt in PROMPTS]
    assert len(found) > 3
    for batch in found:
        orders = [order for order, _ in batch.orders()]
        counts = [len(order.prompts) for order in orders if not of_unet(order.edit)]
        assert sum(counts) <= 9 or len(batch.places) == batches_module.PAIR
        assert orders[0].edit is None


def test_large_pictures_make_smaller_batches(subjects):
    sizes = [
        max(len(b.places) for b in batches(subjects, range(40), Sampling(2, 7.5, side, side)))
        for side in (64, 512, 4096)
    ]
    assert sizes[0] > sizes[1] > sizes[2] >= batches_module.PAIR


def test_an_order_has_two_prompts_however_many_edits(subjects):
    """The engine runs two prompts of an order at least; a single one would be run for nothing."""
    many = [Subject(f"e{i}", subjects[0].edit, subjects[0].questions) for i in range(150)]
    found = batches(many, [0], Sampling(2, 7.5, 512, 512))
    assert all(len(order.prompts) == 2 for batch in found for order, _ in batch.orders())


def test_what_shares_a_run_is_made_together_or_not_at_all(subjects):
    """What is in a batch decides how its sums are rounded."""
    [batch] = batches(subjects, [0], Sampling(2, 7.5, 64, 64))
    names = [owner.name if owner else "" for _, owner in batch.orders()]
    assert names == ["", "one", "two", "three"]
    done = {(name, prompt, 0) for name in ("one", "three") for prompt in PROMPTS}
    assert [owner.name if owner else "" for _, owner in batch.orders(done)] == ["", "one", "two"]
    assert [order for order, _ in batch.orders(done)] == [o for o, _ in batch.orders()][:3]
    assert batch.orders(done | {("two", prompt, 0) for prompt in PROMPTS}) == []


def test_stopped_anywhere_it_goes_on_bit_for_bit(pipe, subjects, small):
    whole: dict[Any, Any] = {}
    for rows, pictures in evaluator(pipe).judge(subjects, SEEDS):
        whole[unit_of(rows[0])] = (rows, pictures)
    assert len(whole) == 2 * (6 + 3 + 5)
    units = list(whole)
    total = evaluator(pipe).left(subjects, SEEDS)
    for stop in (1, 5, 17, 27):
        done = frozenset(units[:stop])
        counts: list[tuple[int, int]] = []
        judge = evaluator(pipe)
        left = judge.left(subjects, SEEDS, done)
        again = list(judge.judge(subjects, SEEDS, lambda *n: counts.append(n), done))  # noqa: B023
        assert [unit_of(rows[0]) for rows, _ in again] == units[stop:]
        # What is made a second time is one batch at most, and its unedited pictures.
        assert left <= total - stop + 9
        assert (counts[-1] if counts else (0, 0)) == (left, left)
        for rows, pictures in again:
            rows_then, pictures_then = whole[unit_of(rows[0])]
            assert rows == rows_then
            assert pictures.keys() == pictures_then.keys()
            assert all(bool((p == pictures_then[n]).all()) for n, p in pictures.items())
    assert evaluator(pipe).left(subjects, SEEDS, frozenset(units)) == 0


def test_the_question_tells_everything_that_matters_apart(pipe, subjects):
    judge = evaluator(pipe)
    same = judge.question(subjects, SEEDS)
    assert evaluator(pipe).question(subjects, SEEDS) == same
    changed = {
        "seeds": judge.question(subjects, [0]),
        "steps": Evaluator.of(pipe, METRIC, steps=3).question(subjects, SEEDS),
        "guidance": Evaluator.of(pipe, METRIC, steps=2, guidance=2.0).question(subjects, SEEDS),
        "weights": evaluator(tiny_pipeline("sd", seed=4)).question(subjects, SEEDS),
        "metric": Evaluator.of(pipe, Metric("other", "other", brightness), steps=2).question(
            subjects, SEEDS
        ),
    }
    lam = Editor(pipe).edit([("dog", "cat")], tokens="last", lam=3.0)
    other = [Subject("one", lam, subjects[0].questions), *subjects[1:]]
    changed["edits"] = judge.question(other, SEEDS)
    fewer = [Subject("one", subjects[0].edit, subjects[0].questions[:3]), *subjects[1:]]
    changed["prompts"] = judge.question(fewer, SEEDS)
    for name, question in changed.items():
        assert question[name] != same[name], name
    assert [n for n in same if changed["seeds"][n] != same[n]] == ["seeds"]


class TestWrongCalls:
    @pytest.mark.parametrize("seeds", [[], "0", [1.5], [True], [-1], None])
    def test_seeds(self, pipe, subjects, seeds):
        with pytest.raises(UsageError, match="[Ss]eed"):
            next(evaluator(pipe).judge(subjects, seeds))

    def test_subjects(self, pipe, subjects):
        judge = evaluator(pipe)
        with pytest.raises(UsageError, match="What is judged is a Subject"):
            next(judge.judge([subjects[0].edit], [0]))  # type: ignore[list-item]
        with pytest.raises(UsageError, match="What is judged is a Subject"):
            next(judge.judge(3, [0]))  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="Two edits have the same name"):
            next(judge.judge([subjects[0], subjects[0]], [0]))
        with pytest.raises(UsageError, match="nothing to judge"):
            next(judge.judge([Subject("e", subjects[0].edit, ())], [0]))

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"step": 3}, "argument 'step'"),
            ({"steps": 0}, "steps"),
            ({"steps": "3"}, "steps"),
            ({"guidance": "high"}, "guidance"),
            ({"height": 63.5}, "height"),
        ],
    )
    def test_sampling(self, pipe, options, words):
        with pytest.raises(UsageError, match=words):
            Evaluator.of(pipe, METRIC, **options)

    def test_numbers_of_numpy_are_numbers(self, pipe, subjects):
        judge = Evaluator.of(pipe, METRIC, steps=np.int64(2), guidance=np.float32(7.5))
        assert judge.sampling == evaluator(pipe).sampling
        [(rows, _)] = judge.judge(
            [Subject("e", subjects[0].edit, subjects[0].questions[:1])], np.array([3])
        )
        assert type(rows[0].seed) is int
