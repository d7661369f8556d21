"""What callers give, made into plain values, or a sentence about what is wrong with it."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable
from numbers import Real
from typing import Any

from fasttrace.errors import UsageError

_INVISIBLE = {"Cc", "Cf", "Zl", "Zp", "Zs"}  # controls, zero-width characters, spaces
# Of other categories, but drawn as nothing: joiner, Hangul and Braille blanks.
_BLANK = set("\u034f\u115f\u1160\u2800\u3164\uffa0")
_SELECTORS = range(0xFE00, 0xFE10)  # say how the letter before them is drawn


def is_blank(phrase: str) -> bool:
    """Whether nothing of it can be seen."""
    return all(
        unicodedata.category(c) in _INVISIBLE or c in _BLANK or ord(c) in _SELECTORS for c in phrase
    )


def parse_text(text: Any, what: str) -> str:
    """Raise `UsageError` unless it is text that can be written anywhere."""
    if not isinstance(text, str):
        raise UsageError(f"{what} is {_shown(text)}; it has to be text.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{what} is {text!a}, which is no valid Unicode text (it holds half a character)."
        ) from None
    return str(text)


def parse_texts(texts: Any, expected: str) -> tuple[str, ...]:
    """Several texts. expected: a sentence without its end, such as "preserve is a list of
    phrases"; it begins with the argument's name."""
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise UsageError(f"{expected}; {_shown(texts)} was given.")
    found = tuple(texts)
    for text in found:
        if not isinstance(text, str):
            raise UsageError(f"{expected}; {_shown(text)} is in it.")
        parse_text(text, f"A text of {expected.split(' ')[0]}")
    return found


def parse_number(value: Any, what: str) -> float:
    """Python's and numpy's numbers alike; NaN and infinite ones too."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UsageError(f"{what} is {_shown(value)}; it has to be a number.")
    try:
        return float(value)
    except OverflowError:
        raise UsageError(f"{what} is {_shown(value)}; it has to be a smaller number.") from None


def parse_positive(value: Any, what: str, most: float = math.inf) -> float:
    number = parse_number(value, what)
    if not 0 < number < most or not math.isfinite(number):
        raise UsageError(f"{what} is {_shown(value)}; it has to be a number above 0.")
    return number


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
