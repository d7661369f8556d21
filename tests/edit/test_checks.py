"""What callers give, made plain or refused."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from fasttrace.edit.checks import is_blank, parse_number, parse_positive, parse_text, parse_texts
from fasttrace.errors import UsageError


@pytest.mark.parametrize(
    "phrase",
    ["", " ", "\t\n", "\u00a0\u3000", "\u200b", "\u200d\u2060\ufeff", "\u00ad", "\u202e", "\ufe0f",
     "\u3164\uffa0\u115f\u1160\u2800", "\u034f", "\x00"],
)  # fmt: skip
def test_nothing_of_it_can_be_seen(phrase: str):
    assert is_blank(phrase)
    assert not is_blank(phrase + "a")


@pytest.mark.parametrize(
    "phrase", ["a", ".", "\u0301", "日", "❤\ufe0f", "\u200bdog", "-", "\ufffd"]
)
def test_something_can_be_seen(phrase: str):
    assert not is_blank(phrase)


def test_text():
    assert type(parse_text(np.str_("dog"), "It")) is str
    for given, words in ((3, "It is 3; it has to be text"), ("a\ud83d", "It is 'a.ud83d', which")):
        with pytest.raises(UsageError, match=words):
            parse_text(given, "It")


def test_a_long_value_is_shown_in_part():
    with pytest.raises(UsageError) as caught:
        parse_number([0.25] * 1000, "lam")
    assert len(str(caught.value)) < 120


def test_texts():
    assert parse_texts(iter(["a", "b", "a"]), "names is a list") == ("a", "b", "a")
    assert parse_texts((), "names is a list") == ()
    for given in ("abc", b"abc", 3, None):
        with pytest.raises(UsageError, match="names is a list; .* was given"):
            parse_texts(given, "names is a list")
    with pytest.raises(UsageError, match="names is a list; None is in it"):
        parse_texts(["a", None], "names is a list")


@pytest.mark.parametrize("given", [2, 2.0, np.float16(2), np.int8(2), Fraction(4, 2)])
def test_numbers(given):
    for found in (parse_number(given, "it"), parse_positive(given, "it")):
        assert found == 2.0
        assert type(found) is float


@pytest.mark.parametrize("given", [True, np.bool_(True), "2", None, 2j, [2], np.array([2.0])])
def test_what_is_no_number(given):
    for parse in (parse_number, parse_positive):
        with pytest.raises(UsageError, match="it is .*; it has to be a number"):
            parse(given, "it")


@pytest.mark.parametrize("given", [0, -1, float("nan"), float("inf"), np.float32("nan"), 5])
def test_what_is_not_above_zero_or_too_large(given):
    with pytest.raises(UsageError, match="it is .*; it has to be a number above 0"):
        parse_positive(given, "it", most=5)
