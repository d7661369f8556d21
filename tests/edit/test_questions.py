"""Which prompts an edit is asked about."""

import pytest

from fasttrace.edit.questions import (
    Most,
    article,
    attribute_of,
    build_questions,
    misspellings,
)
from fasttrace.types import Probe

PROBES = [
    Probe("a dog in flat style", "dog", "object"),
    Probe("an owl on a red ground", "owl", "object"),
    Probe("a car in ink style", "ink", "style"),
    Probe("a dog in ink style", "ink", "style"),
]


def asked(*pairs, **options):
    found = build_questions(pairs, PROBES, **options)
    return {role: [q.prompt for q in found if q.role == role] for role in {q.role for q in found}}


def test_a_phrase_is_asked_in_the_surroundings_of_its_own_attribute():
    found = asked(("dog", "umbrella"))
    assert found["edited"] == ["a dog in flat style", "a dog on a red ground"]


def test_the_target_takes_the_phrases_place_with_the_right_article():
    questions = build_questions([("dog", "umbrella")], PROBES)
    swapped = {q.prompt: q.swapped for q in questions if q.role == "edited"}
    assert swapped["a dog on a red ground"] == "an umbrella on a red ground"


def test_an_empty_target_has_no_prompt_to_compare_with():
    assert all(q.swapped is None for q in build_questions([("dog", "")], PROBES))


def test_what_should_stay_names_no_edited_phrase():
    found = asked(("dog", "cat"))
    assert found["neighbour"] == ["an owl on a red ground"]
    assert found["other"] == ["a car in ink style"]


def test_a_phrase_inside_a_word_is_not_the_phrase():
    probes = [Probe("a hotdog", "hotdog", "food"), Probe("a dog", "dog", "object")]
    found = build_questions([("dog", "cat")], probes)
    assert [q.prompt for q in found if q.role == "other"] == ["a hotdog"]


def test_an_unknown_phrase_takes_its_attribute_from_the_caller_or_every_caption():
    assert attribute_of("fox", PROBES, {"fox": "object"}) == "object"
    assert attribute_of("DOG", PROBES, {}) == "object"
    assert attribute_of("fox", PROBES, {}) == ""
    assert len(asked(("fox", "cat"))["edited"]) == 4
    assert len(asked(("fox", "cat"), attributes={"fox": "object"})["edited"]) == 2


def test_the_edits_own_templates_are_never_asked():
    found = asked(("dog", "cat"), templates=("{}", "the {}", "a picture of {}"))
    assert found["paraphrase"] == ["a drawing of dog", "a rendering of dog"]


def test_the_number_of_questions_is_bounded():
    few = Most(edited=1, paraphrases=1, misspellings=2, neighbours=0, others=1)
    found = asked(("dog", "cat"), most=few)
    assert {role: len(prompts) for role, prompts in found.items()} == {
        "edited": 1,
        "paraphrase": 1,
        "misspelling": 2,
        "other": 1,
    }


@pytest.mark.parametrize("phrase", ["dog", "fire engine", "ox", "van gogh", "a"])
def test_misspellings_differ_from_the_phrase_and_from_each_other(phrase: str):
    found = misspellings(phrase)
    assert phrase not in found
    assert len(found) == len(set(found)) >= 1
    if len(max(phrase.split(), key=len)) > 3:
        assert len(found) == 5


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("a owl", "an owl"),
        ("an dog", "a dog"),
        ("a dog on an red ground", "a dog on a red ground"),
        ("An cat and a apple", "A cat and an apple"),
        ("banana in ink style", "banana in ink style"),
    ],
)
def test_articles_follow_the_next_letter(given: str, right: str):
    assert article(given) == right


def test_a_phrase_may_have_its_article():
    plain = build_questions([("dog", "umbrella")], PROBES)
    dressed = build_questions([("a dog", "an umbrella")], PROBES)
    assert [(q.role, q.prompt, q.swapped) for q in dressed] == [
        (q.role, q.prompt, q.swapped) for q in plain
    ]
    assert attribute_of("a fox", PROBES, {"fox": "object"}) == "object"
