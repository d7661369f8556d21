"""Subjects as token spans, with fast and slow tokenizers."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasttrace.adapters.spans import character_span, token_span, tokenize
from fasttrace.errors import UsageError
from fasttrace.testing.tiny import tiny_tokenizer

FAST = tiny_tokenizer()


class Slow:
    """The same tokens without offsets."""

    is_fast = False
    model_max_length = FAST.model_max_length

    def __call__(self, text, **options):
        assert "return_offsets_mapping" not in options
        return SimpleNamespace(input_ids=list(FAST(text).input_ids))


TOKENIZERS = pytest.mark.parametrize("tokenizer", [FAST, Slow()], ids=["fast", "slow"])


@TOKENIZERS
@pytest.mark.parametrize(
    ("prompt", "subject", "occurrence", "span"),
    [
        ("a photo of a dog", "dog", 0, (5, 6)),
        ("dog", "dog", 0, (1, 2)),
        ("a dog and a dog", "dog", 1, (5, 6)),
        ("a photo of a Red  Car", "red car", 0, (5, 7)),
        ("the big vw in blue", "vw", 0, (3, 5)),  # spelt out: two tokens
        ("a dog, a cat", "dog", 0, (2, 3)),
        ("a cat's house", "cat", 0, (2, 3)),
        ("a photo of a dog", "a photo", 0, (1, 3)),
        ("a photo of a dog", "a photo of a dog", 0, (1, 6)),
        ("a category of cat", "cat", 0, (None, None)),
        ("big, big dog!", "dog!", 0, (4, 6)),
    ],
)
def test_token_spans(tokenizer, prompt, subject, occurrence, span):
    found = token_span(tokenizer, prompt, subject, occurrence)
    if span == (None, None):  # the word, not the beginning of another word
        assert found.stop == tokenize(FAST, prompt).eos
    else:
        assert (found.start, found.stop) == span
    assert found.text.lower().split() == subject.lower().split()


WORDS = st.lists(
    st.sampled_from(["a", "dog", "cat", "Red", "vw", "of", "zx", "é", "b2"]), min_size=1
)


@given(before=WORDS, subject=WORDS.filter(lambda w: len(w) <= 2), after=WORDS)
def test_fast_and_slow_agree(before, subject, after):
    prompt = " ".join([*before, *subject, *after])
    if len(FAST(prompt).input_ids) > FAST.model_max_length:
        return
    words = " ".join(subject)
    fast, slow = token_span(FAST, prompt, words), token_span(Slow(), prompt, words)
    assert (fast.start, fast.stop) == (slow.start, slow.stop)
    ids = FAST(prompt).input_ids[fast.start : fast.stop]
    assert ids == FAST(fast.text).input_ids[1:-1]


def test_merges_across_words_belong_to_the_span():
    """A tokenizer that glues 'red' and 'car' together: their one token is the subject's."""

    class Glue:
        is_fast = False
        model_max_length = 24

        def __call__(self, text, **_):
            words = text.replace("red car", "redcar").split()
            return SimpleNamespace(input_ids=[0, *(10 + len(w) for w in words), 1])

    span = token_span(Glue(), "the big red car", "car")
    assert (span.start, span.stop) == (3, 4)


@pytest.mark.parametrize(
    ("prompt", "subject", "occurrence", "words"),
    [
        ("a photo of a dog", "cat", 0, "'cat' is not in the prompt 'a photo of a dog'."),
        ("a category", "cat", 0, "only part of 'category'"),
        ("a dog", "dog", 1, "appears 1 time(s)"),
        ("a dog", "dog", -1, "appears 1 time(s)"),
        ("a dog", " ", 0, "subject is empty"),
    ],
)
def test_sentences(prompt, subject, occurrence, words):
    with pytest.raises(UsageError) as caught:
        character_span(prompt, subject, occurrence)
    assert words in str(caught.value)


def test_long_prompts_are_refused_with_numbers():
    tokenize(FAST, "dog " * 22)
    with pytest.raises(UsageError, match=r"23 tokens but the text window holds 22"):
        tokenize(FAST, "dog " * 23)
