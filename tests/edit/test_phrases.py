"""Where an edit is learnt: counted by hand, and by tokenizing what stands before."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.text import TextEncoder
from fasttrace.edit.phrases import (
    TEMPLATES,
    Fact,
    Replacement,
    collect,
    last_token,
    parse_replacements,
    parse_templates,
)
from fasttrace.errors import UsageError
from fasttrace.testing.tiny import WINDOW, tiny_tokenizer

UNSEEN = "\ufffd"  # a letter that the tokenizer below drops, as some do


class Words:
    """A slow tokenizer of 77 places with a token a word, and none for what can't be seen."""

    model_max_length = 77
    is_fast = False

    def __init__(self) -> None:
        self.ids = {"<begin>": 0, "<end>": 1}

    def __call__(self, prompt: str, **_: Any) -> Any:
        words = ["<begin>", *prompt.replace(UNSEEN, " ").lower().split(), "<end>"]
        return SimpleNamespace(input_ids=[self.ids.setdefault(w, len(self.ids)) for w in words])


def encoder_with(tokenizer: Any, pipe: Any = None) -> TextEncoder:
    return TextEncoder("text_encoder", None, tokenizer, pipe, penultimate=False)


@pytest.fixture(scope="module")
def tiny_encoder() -> TextEncoder:
    return encoder_with(tiny_tokenizer())


@pytest.fixture
def words() -> TextEncoder:
    return encoder_with(Words())


def of(*pairs: Any, empty: bool = False) -> tuple[Replacement, ...]:
    return parse_replacements(pairs, empty_new=empty)


def places(facts: Any) -> list[tuple[str, int, int]]:
    """(prompt, first position, how many) of every pair's key."""
    return [(facts.prompts[f.prompt], f.position, f.length) for f in facts.facts]


def goals(facts: Any) -> list[list[tuple[str, int, float]]]:
    return [[(facts.prompts[p], at, share) for p, at, share in f.goal] for f in facts.facts]


class TestPositions:
    def test_the_published_count(self, words):
        """Two words to one, four templates, 77 places: 75 + 3 x 72 pairs."""
        found = collect(words, of(("van gogh", "painting")), TEMPLATES, "last_to_end")
        assert places(found) == [
            ("van gogh", 2, 75),
            ("a photo of van gogh", 5, 72),
            ("an image of van gogh", 5, 72),
            ("a picture of van gogh", 5, 72),
        ]
        assert [goal[0][:2] for goal in goals(found)] == [
            ("painting", 1),
            ("a photo of painting", 4),
            ("an image of painting", 4),
            ("a picture of painting", 4),
        ]
        assert found.pairs == 291

    def test_a_longer_target_sets_the_count(self, words):
        found = collect(words, of(("dog", "very big red cat")), ["{}"], "last_to_end")
        assert places(found) == [("dog", 1, 73)]
        assert goals(found) == [[("very big red cat", 4, 1.0)]]
        assert found.pairs == 77 - 4

    def test_the_last_token_alone(self, words):
        found = collect(words, of(("van gogh", "monet")), TEMPLATES, "last")
        assert [(at, n) for _, at, n in places(found)] == [(2, 1), (5, 1), (5, 1), (5, 1)]
        assert [goal[0][1] for goal in goals(found)] == [1, 4, 4, 4]
        assert found.pairs == 4

    @pytest.mark.parametrize(
        "phrase", ["dog", "van gogh", "red  car", "Dog", "éa", "a dog.", "../x"]
    )
    @pytest.mark.parametrize(
        "template", ["{}", "a photo of {}", "{} in the house", "a {} dog", "the {}, a big dog"]
    )
    def test_tokens_that_survive_cutting_the_prompt_behind_the_phrase(
        self, tiny_encoder, phrase, template
    ):
        found = collect(tiny_encoder, of((phrase, "blue")), [template], "last")
        cut = template[: template.index("{}")] + phrase
        [(prompt, at, _)] = places(found)
        assert prompt == template.replace("{}", phrase)
        assert at == len(tiny_encoder.tokenizer(cut).input_ids) - 2
        assert goals(found)[0][0][1] == template[: template.index("{}")].count(" ") + 1

    def test_spelt_words_by_hand(self, tiny_encoder):
        """v a n g o g h: seven tokens after the first."""
        found = collect(tiny_encoder, of(("van gogh", "dog")), ["a {} in"], "last_to_end")
        assert places(found) == [("a van gogh in", 8, WINDOW - 8)]
        assert goals(found) == [[("a dog in", 2, 1.0)]]

    def test_a_token_that_merges_phrase_and_template_is_the_phrases(self, tiny_encoder):
        found = collect(tiny_encoder, of(("paint", "dog")), ["a {}ing"], "last")
        [(prompt, at, _)] = places(found)
        assert (prompt, at) == ("a painting", 2)

    @pytest.mark.parametrize("tokens", ["last", "last_to_end"])
    def test_a_textual_inversion_is_written_out_once(self, tokens):
        """The encoder writes it out as well, and twice would be another prompt."""
        pipe = SimpleNamespace(maybe_convert_prompt=lambda p, _: p.replace("<x>", "<x> <x>_1"))
        found = collect(encoder_with(Words(), pipe), of(("<x> dog", "a <x>")), ["a {}"], tokens)
        assert [(prompt, at) for prompt, at, _ in places(found)] == [("a <x> dog", 4)]
        assert goals(found) == [[("a a <x>", 4, 1.0)]]

    @pytest.mark.parametrize("phrase", ["dog", "van gogh", "a dog.", "red car"])
    @pytest.mark.parametrize("template", ["{}", "a photo of {}", "{} in the house", "a {}."])
    def test_slow_tokenizers_find_what_fast_ones_do(self, tiny_encoder, phrase, template):
        class Slow:
            is_fast, model_max_length = False, WINDOW

            def __call__(self, prompt: str, **options: Any) -> Any:
                return tiny_encoder.tokenizer(prompt, **options)

        for tokens in ("last", "last_to_end", "aligned"):
            fast = collect(tiny_encoder, of((phrase, "blue")), [template], tokens)
            assert collect(encoder_with(Slow()), of((phrase, "blue")), [template], tokens) == fast


class TestAligned:
    def test_what_both_prompts_have(self, words):
        """begin, a, red, car, end, padding -> begin, a, blue, small, car, end, padding."""
        found = collect(words, of(("red", "blue small")), ["a {} car"], "aligned")
        assert [(f.position, f.length) for f in found.facts] == [
            (i, 1) for i in range(77) if i != 2
        ]
        where = {f.position: f.goal[0][1] for f in found.facts}
        assert {i: where[i] for i in (0, 1, 3, 4, 5, 6)} == {0: 0, 1: 1, 3: 4, 4: 5, 5: 6, 6: 7}
        # padding: one position later, the last one twice
        assert [where[i] for i in range(5, 77)] == [*range(6, 77), 76]
        assert found.pairs == 76

    def test_a_shorter_target(self, words):
        found = collect(words, of(("red big", "blue")), ["{} car"], "aligned")
        where = {f.position: f.goal[0][1] for f in found.facts}
        assert 1 not in where
        assert 2 not in where
        assert (where[0], where[3], where[4], where[5], where[76]) == (0, 2, 3, 4, 75)
        assert found.pairs == 75

    def test_a_token_has_to_be_in_every_target(self, words):
        one = Replacement("red", ("blue dog", "green"))
        found = collect(words, (one,), ["a {} dog"], "aligned")
        both = {f.position: [at for _, at, _ in f.goal] for f in found.facts}
        assert both[1] == [1, 1]
        assert 2 not in both
        assert both[4] == [5, 4]

    def test_the_empty_target_is_the_text_of_no_prompt(self, words):
        found = collect(words, of(("red", ""), empty=True), ["a {} car"], "aligned")
        assert {prompt for goal in goals(found) for prompt, _, _ in goal} == {""}
        where = {f.position: f.goal[0][1] for f in found.facts}
        assert {i: where[i] for i in where if i < 6} == {0: 0, 4: 1, 5: 2}


class TestTargets:
    def test_several_are_their_mean(self, words):
        pair = Replacement("doctor", ("woman doctor", "man"))
        found = collect(words, (pair,), ["a {}"], "last")
        assert goals(found) == [[("a woman doctor", 3, 0.5), ("a man", 2, 0.5)]]

    def test_weights_are_shares(self, words):
        pair = Replacement("doctor", ("a", "b", "c"), weights=(3, 2, 1))
        assert pair.shares == pytest.approx((1 / 2, 1 / 3, 1 / 6))
        found = collect(words, (pair,), ["{}"], "last_to_end")
        assert [share for _, _, share in goals(found)[0]] == list(pair.shares)

    @pytest.mark.parametrize("strength", [0.25, 1.5])
    def test_strength_leaves_the_rest_to_the_old_phrase(self, words, strength):
        pair = Replacement("dog", ("cat", "big cow"), strength)
        for tokens, at in (("last", 1), ("last_to_end", 1), ("aligned", 0)):
            found = collect(words, (pair,), ["{}"], tokens)
            assert goals(found)[0][-1] == ("dog", at, 1 - strength)
            for goal in goals(found):
                assert sum(share for _, _, share in goal) == pytest.approx(1)

    def test_preserved_phrases_have_no_goal(self, words):
        found = collect(words, of(("dog", "cat")), ["{}", "a {}"], "last", ("big monet",))
        assert [f for f in found.facts if not f.goal] == [Fact(4, 2), Fact(5, 3)]
        assert found.prompts[4:] == ("big monet", "a big monet")
        found = collect(words, of(("dog", "cat")), ["{}"], "last_to_end", ("big monet",))
        assert found.facts[-1].length == 75

    def test_every_prompt_is_read_once(self, words):
        found = collect(words, of(("dog", "cat"), ("cat", "dog")), ["{}", "a {}"], "last", ("dog",))
        assert sorted(found.prompts) == ["a cat", "a dog", "cat", "dog"]
        assert found.pairs == 6

    def test_the_empty_target_is_read_from_its_first_token(self, words):
        found = collect(words, of(("big dog", ""), empty=True), ["a {}"], "last_to_end")
        assert places(found) == [("a big dog", 3, 74)]
        assert goals(found) == [[("", 0, 1.0)]]


class TestParsing:
    def test_the_same_pair_twice_is_once(self):
        found = of(("dog", "cat"), ["dog", "cat"], Replacement("dog", "cat"), ("cow", ["a", "b"]))
        assert found == (Replacement("dog", "cat"), Replacement("cow", ("a", "b")))

    def test_the_same_pair_in_other_words_is_once(self):
        """Tokenizers see neither case nor spaces."""
        found = of(("Van  Gogh", "cat"), ("van gogh", "Cat"), ("van gogh", ("cat",)))
        assert found == (Replacement("Van  Gogh", "cat"),)

    @pytest.mark.parametrize("pairs", ["dog", Replacement("dog", "cat"), None, 3])
    def test_what_is_no_list(self, pairs):
        with pytest.raises(UsageError, match="pairs is a list, such as"):
            parse_replacements(pairs, empty_new=False)

    def test_none(self):
        with pytest.raises(UsageError, match="pairs is empty; give at least one"):
            parse_replacements([], empty_new=False)

    @pytest.mark.parametrize(
        "pair",
        [
            "ab",
            "dog",
            5,
            None,
            ("dog",),
            ("dog", "cat", "cow"),
            (1, "cat"),
            ("dog", 1),
            ("dog", [1]),
        ],
    )
    def test_what_is_no_pair(self, pair):
        with pytest.raises(UsageError, match="A pair is two phrases, .* this is none: "):
            of(("x", "y"), pair)

    @pytest.mark.parametrize("pair", [Replacement(1, "cat"), Replacement("dog", None)])  # type: ignore[arg-type]
    def test_a_record_of_no_phrases(self, pair):
        with pytest.raises(UsageError, match="A pair is two phrases, .* this is none: "):
            of(pair)

    @pytest.mark.parametrize(
        ("pair", "words"),
        [
            (("", "cat"), "phrase to edit is empty in the pair '' -> 'cat'"),
            ((" \t", "cat"), "phrase to edit is empty"),
            (("\u200b", "cat"), "phrase to edit is empty"),  # nothing of it can be seen
            ((" \ufeff\u2060\u00ad", "cat"), "phrase to edit is empty"),
            (("\u3164", "cat"), "phrase to edit is empty"),
            (("dog", "\u200b"), "'dog' is to become the empty phrase"),
            (("dog\ud800", "cat"), "A phrase is 'dog.ud800', which is no valid Unicode text"),
            (("dog", ["cat", "\udfff"]), "no valid Unicode text"),
            (("dog", ""), "'dog' is to become the empty phrase, which has no token"),
            (("dog", " "), "'dog' is to become the empty phrase"),
            (("dog", ["cat", ""]), "'dog' is to become the empty phrase"),
            (("dog", []), "'dog' is to become nothing"),
            (("dog", "dog"), "'dog' is to become itself"),
            (("Dog", " dOG "), "'Dog' is to become itself"),
            (("dog", ["cat", "DOG"]), "'dog' is to become itself"),
            (
                Replacement("dog", "cat", 0.0),
                "strength of 'dog' is 0.0; it has to be a number above 0",
            ),
            (Replacement("dog", "cat", -1), "strength of 'dog' is -1"),
            (Replacement("dog", "cat", float("nan")), "strength of 'dog' is nan"),
            (Replacement("dog", "cat", float("inf")), "strength of 'dog' is inf"),
            (Replacement("dog", "cat", "1"), "strength of 'dog' is '1'"),  # type: ignore[arg-type]
            (Replacement("dog", ("a", "b"), weights=(1.0, 0.0)), "weight of 'dog' is 0.0"),
            (Replacement("dog", ("a", "b"), weights=(1.0, -2.0)), "weight of 'dog' is -2.0"),
            (Replacement("dog", ("a", "b"), weights=(1.0,)), "2 target phrases but 1 weights"),
            (Replacement("dog", "cat", True), "strength of 'dog' is True"),
            (Replacement("dog", "cat", None), "strength of 'dog' is None"),  # type: ignore[arg-type]
            (Replacement("dog", "cat", weights=0.5), "weights of 'dog' are 0.5; expected a number"),  # type: ignore[arg-type]
            (Replacement("dog", "cat", weights="1"), "weights of 'dog' are '1'"),  # type: ignore[arg-type]
            (Replacement("dog", ("a", "b"), weights=("1", 2)), "weight of 'dog' is '1'"),  # type: ignore[arg-type]
            (Replacement("dog", "a", weights=(1.0, 2.0)), "1 target phrases but 2 weights"),
        ],
    )
    def test_wrong_pairs(self, pair, words):
        with pytest.raises(UsageError, match=words):
            of(pair)

    @pytest.mark.parametrize(
        "other",
        [
            ("dog", "cow"),
            ("DOG ", "cow"),
            ("dog", ["cat", "cow"]),
            Replacement("dog", "cat", 0.5),
            Replacement("dog", ("cat", "cow"), weights=(1.0, 2.0)),
        ],
    )
    def test_contradictions(self, other):
        with pytest.raises(UsageError, match=r"is to become both .* give it once"):
            of(("dog", "cat"), other)

    def test_the_empty_target_where_it_is_one(self):
        assert of(("dog", ""), empty=True) == (Replacement("dog", ""),)


class TestTemplates:
    def test_each_once(self):
        assert parse_templates(["{}", "a {}", "{}"]) == ("{}", "a {}")

    @pytest.mark.parametrize(
        ("templates", "words"),
        [
            ("{}", "templates is a list"),
            ([], "templates is empty"),
            (["a dog"], "template 'a dog' needs one {}"),
            (["{} and {}"], "needs one {}"),
            (3, "templates is a list, .*; 3 was given"),
            ([3], "templates is a list, .*; 3 is in it"),
            ([None], "templates is a list, .*; None is in it"),
            (["a {}\ud800"], "A text of templates is .* no valid Unicode text"),
        ],
    )
    def test_wrong_ones(self, templates, words):
        with pytest.raises(UsageError, match=words):
            parse_templates(templates)

    @pytest.mark.parametrize("template", ["{0} {}", "a {style} {}", "{ {}", "} {}"])
    def test_other_braces_are_characters(self, tiny_encoder, template):
        [template] = parse_templates([template])
        for tokens in ("last", "aligned"):
            found = collect(tiny_encoder, of(("dog", "{}")), [template], tokens)
            assert found.prompts == (
                template.replace("{}", "dog"),
                template.replace("{}", "{}"),
            )


class TestWhatCantBeRead:
    @pytest.mark.parametrize("tokens", ["last", "last_to_end", "aligned"])
    @pytest.mark.parametrize("side", [0, 1])
    def test_too_long(self, tiny_encoder, words, tokens, side):
        for encoder, count in ((tiny_encoder, WINDOW - 2), (words, 75)):
            phrase = " ".join(["red"] * (count - 3))
            pair = (phrase, "dog") if side == 0 else ("dog", phrase)
            collect(encoder, of(pair), ["a photo of {}"], tokens)
            long = ("red " + phrase, "dog") if side == 0 else ("dog", "red " + phrase)
            with pytest.raises(UsageError, match=f"{count + 1} tokens but .* holds {count}"):
                collect(encoder, of(long), ["a photo of {}"], tokens)

    @pytest.mark.parametrize("tokens", ["last", "aligned"])
    def test_too_long_is_one_sentence_alone(self, sd, tokens, caplog):
        """The pipeline's own way to convert a prompt warns of its length."""
        encoder = Model(sd).encoders[0]
        sd.tokenizer.deprecation_warnings.clear()
        logger = logging.getLogger("transformers")
        logger.addHandler(caplog.handler)
        try:
            with pytest.raises(UsageError, match="tokens but the text window holds"):
                collect(encoder, of(("red " * 400, "dog")), ["{}"], tokens)
        finally:
            logger.removeHandler(caplog.handler)
        assert not caplog.messages

    def test_a_preserved_phrase_too_long(self, tiny_encoder):
        with pytest.raises(UsageError, match="tokens but the text window holds"):
            collect(tiny_encoder, of(("dog", "cat")), ["{}"], "last", ("red " * 30,))

    @pytest.mark.parametrize("pair", [(UNSEEN, "dog"), ("dog", UNSEEN)])
    def test_no_token(self, words, pair):
        with pytest.raises(UsageError, match=f"The phrase '{UNSEEN}' has no token of its own in"):
            collect(words, of(pair), ["a {} dog"], "last")

    def test_no_token_between_two(self):
        tokenizer = tiny_tokenizer()
        assert last_token(tokenizer, "a  dog", 1, 2) is None
        assert last_token(tokenizer, "a dog", 0, 1) == 1
        assert last_token(tokenizer, "a dog", 2, 5) == 2

    @pytest.mark.parametrize("tokens", ["first", "", None, 3])
    def test_unknown_tokens(self, words, tokens):
        with pytest.raises(UsageError, match="tokens is .*; expected one of last, last_to_end"):
            collect(words, of(("dog", "cat")), ["{}"], tokens)

    @pytest.mark.parametrize("phrase", [" ", "\u200b"])
    def test_an_empty_phrase_to_preserve(self, words, phrase):
        with pytest.raises(UsageError, match="A phrase to preserve is empty"):
            collect(words, of(("dog", "cat")), ["{}"], "last", (phrase,))
