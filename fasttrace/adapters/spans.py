"""Where a subject stands among a prompt's tokens."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from fasttrace.errors import UsageError
from fasttrace.types import Span


@dataclass(frozen=True)
class Tokens:
    """A prompt as one tokenizer sees it: `ids` unpadded, with begin and end tokens."""

    prompt: str
    ids: tuple[int, ...]
    window: int  # padded length

    @property
    def eos(self) -> int:
        """Position of the end token."""
        return len(self.ids) - 1

    @property
    def padding(self) -> tuple[int, ...]:
        return tuple(range(len(self.ids), self.window))


def tokenize(tokenizer: Any, prompt: str, window: int | None = None) -> Tokens:
    """Token ids of `prompt`. Raises `UsageError` when they don't fit the text window.

    window: the padded length, where it isn't the tokenizer's own.
    """
    # verbose=False: its own warning about long prompts is replaced by the error below.
    ids = tuple(int(i) for i in tokenizer(prompt, verbose=False).input_ids)
    window = window or int(tokenizer.model_max_length)
    if len(ids) > window:
        raise UsageError(
            f"The prompt has {len(ids) - 2} tokens but the text window holds {window - 2}: "
            f"'{_shorten(prompt)}'. Shorten the prompt."
        )
    return Tokens(prompt, ids, window)


def character_span(prompt: str, subject: str, occurrence: int = 0) -> tuple[int, int]:
    """Characters [start, stop) of the nth whole-word appearance of `subject`, case aside.

    Raises `UsageError` where the subject is empty, absent, only part of other words, or appears
    fewer than `occurrence + 1` times.
    """
    if not subject.strip():
        raise UsageError("The subject is empty; name the words of the prompt to destroy.")
    words = r"\s+".join(re.escape(w) for w in subject.split())
    left = r"(?<!\w)" if re.match(r"\w", subject.strip()) else ""
    right = r"(?!\w)" if re.search(r"\w$", subject.strip()) else ""
    found = [m.span() for m in re.finditer(left + words + right, prompt, re.IGNORECASE)]
    if not found:
        inside = re.search(r"\w*" + words + r"\w*", prompt, re.IGNORECASE)
        hint = f"; it is only part of '{inside.group()}'" if inside else ""
        if not inside and unicodedata.normalize("NFC", subject) in unicodedata.normalize(
            "NFC", prompt
        ):
            hint = "; its accents are other characters than the prompt's, so copy it from there"
        raise UsageError(
            f"The subject '{subject}' is not in the prompt '{_shorten(prompt)}'{hint}."
        )
    if not 0 <= occurrence < len(found):
        raise UsageError(
            f"The subject '{subject}' appears {len(found)} time(s) in '{_shorten(prompt)}'; "
            f"occurrence {occurrence} was asked for (they count from 0)."
        )
    return found[occurrence]


def token_span(
    tokenizer: Any, prompt: str, subject: str, occurrence: int = 0, window: int | None = None
) -> Span:
    """Token positions of the nth `subject` in the padded prompt.

    Fast tokenizers tell which characters a token covers; for slow ones the tokens before the
    subject are those that survive cutting the prompt there, and those after it likewise. Tokens
    that merge subject and neighbours belong to the span.
    """
    tokens = tokenize(tokenizer, prompt, window)
    start, stop = character_span(prompt, subject, occurrence)
    if getattr(tokenizer, "is_fast", False):
        covers = tokenizer(prompt, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        inside = [i for i, (a, b) in enumerate(covers) if a < stop and b > start and b > a]
        first, last = (inside[0], inside[-1] + 1) if inside else (0, 0)
    else:
        before = tokenizer(prompt[:start].rstrip(), verbose=False).input_ids
        after = tokenizer(prompt[stop:].lstrip(), verbose=False).input_ids
        first = _common(tokens.ids, before[:-1])
        last = len(tokens.ids) - _common(tokens.ids[::-1], after[:0:-1])
    if first >= last:
        raise UsageError(
            f"The subject '{subject}' has no token of its own in '{_shorten(prompt)}'."
        )
    return Span(first, last, prompt[start:stop])


def token_text(tokenizer: Any, token: int) -> str:
    """One token as a reader would write it."""
    text: str = tokenizer.convert_ids_to_tokens(token)
    return text.replace("</w>", "").replace("Ġ", "").replace("▁", "")


def _common(one: tuple[int, ...], two: list[int]) -> int:
    """Length of the common beginning."""
    n = 0
    while n < min(len(one), len(two)) and one[n] == two[n]:
        n += 1
    return n


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
