"""Judging edits: every question and seed once, pictures as the pipeline itself makes them."""

import json

import pytest
import torch

from fasttrace.edit.editor import Editor
from fasttrace.edit.evaluate import Evaluator, Subject, expected
from fasttrace.edit.questions import Question
from fasttrace.errors import UsageError
from fasttrace.testing.tiny import tiny_pipeline
from fasttrace.types import Metric

QUESTIONS = (
    Question("edited", "a dog in the house", "dog", "object", "a cat in the house"),
    Question("neighbour", "a red car", "car", "object"),
    Question("other", "a blue painting", "painting", "style"),
)


def brightness(pictures, context):
    """Of the picture, and how long the prompt is: so a score tells which prompt it is of."""
    return pictures.mean((1, 2, 3)) + len(context.probe.prompt)


METRIC = Metric("brightness", "brightness", brightness)


class Halves:
    """Classes by brightness: enough to see which picture was shown to it."""

    classes = {"object": ["dog", "car", "cat"], "style": ["painting"]}  # noqa: RUF012

    def probabilities(self, pictures):
        mean = pictures.mean((1, 2, 3))
        one = torch.stack([mean, 1 - mean, torch.zeros_like(mean)], 1)
        return {"object": one, "style": torch.ones(len(mean), 1)}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("sd", seed=3)


@pytest.fixture(scope="module")
def evaluator(pipe):
    found = Evaluator.of(pipe, METRIC, steps=2, guidance=4.0)
    found.classifier = Halves()
    return found


def picture(pipe, prompt: str, seed: int):
    generator = torch.Generator().manual_seed(seed)
    made = pipe(prompt, num_inference_steps=2, guidance_scale=4.0, generator=generator,
                output_type="pt")  # fmt: skip
    return made.images[0]


@pytest.mark.parametrize("method", ["diffquickfix", "uce"])
def test_pictures_are_the_pipelines_own_without_and_with_the_edit(pipe, evaluator, method: str):
    edit = Editor(pipe).edit([("dog", "cat")], method=method, tokens="last")
    rows, pictures, counts = [], {}, []
    subject = Subject("no-dogs", edit, QUESTIONS)
    for found, shown in evaluator.judge([subject], [0, 5], lambda *n: counts.append(n)):
        rows += found
        pictures |= shown
    assert sorted((r.role, r.seed) for r in rows) == [
        (role, seed) for role in ("edited", "neighbour", "other") for seed in (0, 5)
    ]
    assert counts[-1] == (12, 12)
    moved = 0.0
    for row in rows:
        before = picture(pipe, row.prompt, row.seed)
        with edit.applied(pipe):
            after = picture(pipe, row.prompt, row.seed)
        assert torch.allclose(pictures[row.picture_before], before, atol=1e-4)
        assert torch.allclose(pictures[row.picture_after], after, atol=1e-4)
        assert row.before == pytest.approx(float(before.mean()) + len(row.prompt), abs=1e-3)
        assert row.after == pytest.approx(float(after.mean()) + len(row.prompt), abs=1e-3)
        if row.role == "edited":
            moved += float((before - after).abs().max())
            assert row.new_after == pytest.approx(row.after, abs=1e-3)  # one letter as long
            assert json.loads(row.expected) == {"object": "dog"}
        else:
            assert row.new_after is None
        bright = float(after.mean())
        assert json.loads(row.shown_after)["object"] == ("dog" if bright > 0.5 else "car")
    assert moved > 0.01


def test_two_edits_are_told_apart(pipe, evaluator):
    editor = Editor(pipe)
    subjects = [
        Subject(name, editor.edit([pair], tokens="last"), QUESTIONS[:1])
        for name, pair in (("one", ("dog", "cat")), ("two", ("dog", "tiny house")))
    ]
    found = {r.edit: r for rows, _ in evaluator.judge(subjects, [0]) for r in rows}
    assert found["one"].before == found["two"].before
    assert found["one"].after != found["two"].after
    assert found["one"].picture_after != found["two"].picture_after


def test_a_misspelt_phrase_means_the_word_it_should_be(pipe, evaluator):
    edit = Editor(pipe).edit([("dog", "cat")])
    asked = (Question("misspelling", "a dgo", "dog", "object"), QUESTIONS[1])
    rows = [r for found, _ in evaluator.judge([Subject("e", edit, asked)], [0]) for r in found]
    assert json.loads(next(r.expected for r in rows if r.role == "misspelling")) == {
        "object": "dog"
    }


def test_the_longest_class_in_a_prompt_is_meant():
    classes = {"object": ["engine", "fire engine", "car"], "style": ["flat"]}
    assert expected("a fire engine, Flat", classes) == {"object": "fire engine", "style": "flat"}
    assert expected("a cart", classes) == {}


def test_nothing_to_judge_is_refused(evaluator):
    with pytest.raises(UsageError, match="nothing to judge"):
        next(evaluator.judge([], [0]))


def test_a_metric_of_latents_is_refused(pipe):
    with pytest.raises(UsageError, match="picture"):
        Evaluator.of(pipe, "latent_distance")
