"""What an edit is told: phrases and what they become, and at which tokens that is learnt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal

from fasttrace.adapters.spans import tokenize
from fasttrace.adapters.text import TextEncoder
from fasttrace.edit.checks import is_blank, parse_positive, parse_text, parse_texts
from fasttrace.errors import UsageError

Tokens = Literal["last", "last_to_end", "aligned"]
TOKENS = ("last", "last_to_end", "aligned")
TEMPLATES = ("{}", "a photo of {}", "an image of {}", "a picture of {}")


@dataclass(frozen=True)
class Replacement:
    """`old` shall read as `new`.

    new: "" is the text of no prompt at all; several phrases are their mean, by `weights` where
    given (debiasing). strength: how far towards `new`, below 1 moderates.
    """

    old: str
    new: str | tuple[str, ...]
    strength: float = 1.0
    weights: tuple[float, ...] | None = None

    @property
    def news(self) -> tuple[str, ...]:
        return (self.new,) if isinstance(self.new, str) else self.new

    @property
    def shares(self) -> tuple[float, ...]:
        """Of each of `news`; they add up to 1."""
        weights = self.weights or (1.0,) * len(self.news)
        return tuple(weight / sum(weights) for weight in weights)


@dataclass(frozen=True)
class Fact:
    """`length` pairs: the inputs from `position` of `prompt` on (its number in `Facts`) are keys.

    goal: what they are to read like, position by position: (prompt, position, share) each, shares
    adding up to 1; empty keeps the outputs as they are.
    """

    prompt: int
    position: int
    length: int = 1
    goal: tuple[tuple[int, int, float], ...] = ()


@dataclass(frozen=True)
class Facts:
    """Every pair of an edit, and the prompts they are read from, each once."""

    prompts: tuple[str, ...]
    facts: tuple[Fact, ...]

    @property
    def pairs(self) -> int:
        return sum(fact.length for fact in self.facts)


def parse_replacements(pairs: Iterable[Any], *, empty_new: bool) -> tuple[Replacement, ...]:
    """("van gogh", "painting") or a `Replacement` each. Raises `UsageError` with the pair in it.

    empty_new: whether the empty text is a target.
    """
    if isinstance(pairs, str | bytes | Replacement) or not isinstance(pairs, Iterable):
        raise UsageError('pairs is a list, such as [("van gogh", "painting")].')
    found = tuple(_replacement(pair) for pair in pairs)
    if not found:
        raise UsageError('pairs is empty; give at least one, such as ("van gogh", "painting").')
    for each in found:
        _check(each, empty_new)
    seen: dict[str, Replacement] = {}
    for each in found:
        before = seen.setdefault(_plain(each.old), each)
        if _meaning(before) != _meaning(each):
            raise UsageError(
                f"'{each.old}' is to become both {before.new!r} and {each.new!r}; give it once."
            )
    return tuple(seen.values())


def _meaning(pair: Replacement) -> tuple[Any, ...]:
    return [_plain(new) for new in pair.news], pair.shares, pair.strength


def _replacement(pair: Any) -> Replacement:
    """With plain phrases and numbers in it."""
    given = pair if isinstance(pair, Replacement) else None
    old: Any = None
    new: Any = None
    with suppress(TypeError, ValueError):
        old, new = pair if given is None else (given.old, given.new)
    several = isinstance(new, tuple | list) and all(isinstance(n, str) for n in new)
    if isinstance(pair, str) or not isinstance(old, str) or not (isinstance(new, str) or several):
        raise UsageError(
            f"A pair is two phrases, such as ('van gogh', 'painting'); this is none: {pair!r}."
        )
    for phrase in (old, *((new,) if isinstance(new, str) else new)):
        parse_text(phrase, "A phrase")
    new = new if isinstance(new, str) else tuple(new)
    if given is None:
        return Replacement(old, new)
    weights: Any = given.weights
    if weights is not None:
        if isinstance(weights, str | bytes) or not isinstance(weights, Iterable):
            raise UsageError(
                f"The weights of '{old}' are {weights!r}; expected a number for each of its target "
                "phrases, such as (1, 3)."
            )
        weights = tuple(parse_positive(w, f"The weight of '{old}'") for w in weights)
    return Replacement(
        old, new, parse_positive(given.strength, f"The strength of '{old}'"), weights
    )


def _check(pair: Replacement, empty_new: bool) -> None:
    if is_blank(pair.old):
        raise UsageError(f"The phrase to edit is empty in the pair {pair.old!r} -> {pair.new!r}.")
    if not pair.news:
        raise UsageError(f"'{pair.old}' is to become nothing; give it at least one phrase.")
    for new in pair.news:
        if is_blank(new) and not empty_new:
            raise UsageError(
                f"'{pair.old}' is to become the empty phrase, which has no token to read; give a "
                "word, such as 'a'."
            )
        if _plain(new) == _plain(pair.old):
            raise UsageError(f"'{pair.old}' is to become itself; give another phrase.")
    if pair.weights is not None and len(pair.weights) != len(pair.news):
        raise UsageError(
            f"'{pair.old}' has {len(pair.news)} target phrases but {len(pair.weights)} weights."
        )


def parse_templates(templates: Any) -> tuple[str, ...]:
    """Sentences with one {} each. Raises `UsageError`."""
    found = parse_texts(templates, "templates is a list, such as ['{}', 'a photo of {}']")
    for template in found:
        if template.count("{}") != 1:
            raise UsageError(
                f"The template '{template}' needs one {{}} where the phrase goes, such as "
                "'a photo of {}'."
            )
    if not found:
        raise UsageError("templates is empty; give at least '{}', the phrase alone.")
    return tuple(dict.fromkeys(found))


def collect(
    encoder: TextEncoder,
    pairs: Sequence[Replacement],
    templates: Sequence[str],
    tokens: Tokens,
    preserve: Sequence[str] = (),
) -> Facts:
    """Where each pair is learnt: every template on both sides, position by position.

    last: at the phrase's last token. last_to_end: from there to the end of the padded text, both
    sides counted from their own last token. aligned: every token of the old prompt that the new one
    also has, and what follows (Orgad et al., arXiv 2303.08084). Raises `UsageError` for a phrase
    that doesn't fit the text or has no token.
    """
    if not isinstance(tokens, str) or tokens not in TOKENS:
        raise UsageError(f"tokens is {tokens!r}; expected one of {', '.join(TOKENS)}.")
    found = _Collector(encoder, tokens)
    for pair in pairs:
        for template in templates:
            found.pair(pair, template)
    for phrase in preserve:
        if is_blank(phrase):
            raise UsageError("A phrase to preserve is empty.")
        for template in templates:
            found.keep(phrase, template)
    return Facts(tuple(found.prompts), tuple(found.facts))


class _Collector:
    def __init__(self, encoder: TextEncoder, tokens: Tokens) -> None:
        self.encoder, self.tokens = encoder, tokens
        self.window = encoder.window
        self.prompts: dict[str, int] = {}
        self.facts: list[Fact] = []
        self.places: dict[tuple[str, str], tuple[int, int]] = {}

    def pair(self, pair: Replacement, template: str) -> None:
        if self.tokens == "aligned":
            self._aligned(pair, template)
            return
        old, at = self._place(pair.old, template)
        news = [self._place(new, template) for new in pair.news]
        goals = [
            (prompt, place, share * pair.strength)
            for (prompt, place), share in zip(news, pair.shares, strict=True)
        ]
        length = self._run([at, *(place for _, place in news)])
        self._fact(pair, old, at, goals, length)

    def keep(self, phrase: str, template: str) -> None:
        prompt, at = self._place(phrase, template)
        self.facts.append(Fact(prompt, at, self._run([at])))

    def _run(self, places: Sequence[int]) -> int:
        """How many positions from those on are learnt."""
        return 1 if self.tokens == "last" else self.window - max(places)

    def _aligned(self, pair: Replacement, template: str) -> None:
        old, ids = self._whole(template, pair.old)
        news = [self._whole(template, new) for new in pair.news]
        maps = [_common_tokens(ids, other) for _, other in news]
        # What follows the end token is padding, on both sides.
        for i in range(self.window):
            where = [
                found.get(i) if i < len(ids) else min(i - len(ids) + len(other), self.window - 1)
                for found, (_, other) in zip(maps, news, strict=True)
            ]
            if None in where:
                continue
            goals = [
                (prompt, int(place or 0), share * pair.strength)
                for (prompt, _), place, share in zip(news, where, pair.shares, strict=True)
            ]
            self._fact(pair, old, i, goals)

    def _whole(self, template: str, phrase: str) -> tuple[int, tuple[int, ...]]:
        prompt = _filled(template, phrase)
        tokenize(self.encoder.tokenizer, prompt, self.window)  # see `_find`
        return self._number(prompt), self.encoder.tokens(prompt).ids

    def _fact(
        self,
        pair: Replacement,
        prompt: int,
        position: int,
        goals: list[tuple[int, int, float]],
        length: int = 1,
    ) -> None:
        if pair.strength != 1:
            goals.append((prompt, position, 1 - pair.strength))
        self.facts.append(Fact(prompt, position, length, tuple(goals)))

    def _number(self, prompt: str) -> int:
        return self.prompts.setdefault(prompt, len(self.prompts))

    def _place(self, phrase: str, template: str) -> tuple[int, int]:
        """(prompt, position of the phrase's last token). The empty phrase: the begin token."""
        if (phrase, template) not in self.places:
            self.places[phrase, template] = self._find(phrase, template)
        return self.places[phrase, template]

    def _find(self, phrase: str, template: str) -> tuple[int, int]:
        if is_blank(phrase):
            return self._number(""), 0
        encoder = self.encoder
        text = _filled(template, phrase)
        # Before it is converted: a text that is too long makes the pipeline's own way warn.
        tokenize(encoder.tokenizer, text, encoder.window)
        before, prompt = (encoder.convert(t) for t in (template[: template.index("{}")], text))
        start = len(before)
        stop = start + len(encoder.convert(phrase))
        last = last_token(encoder.tokenizer, prompt, start, stop)
        if last is None:
            raise UsageError(f"The phrase '{phrase}' has no token of its own in '{prompt}'.")
        return self._number(text), last  # unconverted: whoever encodes it converts it


def last_token(tokenizer: Any, prompt: str, start: int, stop: int) -> int | None:
    """The last position whose token covers characters of [start, stop); None without one."""
    if not getattr(tokenizer, "is_fast", False):
        before = tokenize(tokenizer, prompt[:start].rstrip()).eos
        after = tokenize(tokenizer, prompt[:stop].rstrip()).eos
        tokenize(tokenizer, prompt)
        return after - 1 if after > before else None
    found = tokenizer(prompt, return_offsets_mapping=True, verbose=False)
    if len(found["input_ids"]) > tokenizer.model_max_length:
        tokenize(tokenizer, prompt)  # says so
    inside = [
        i for i, (a, b) in enumerate(found["offset_mapping"]) if a < stop and b > max(start, a)
    ]
    return inside[-1] if inside else None


def _common_tokens(old: Sequence[int], new: Sequence[int]) -> dict[int, int]:
    """Old position -> new position of the tokens that both have, in order."""
    matcher = SequenceMatcher(None, old, new, autojunk=False)
    return {a + i: b + i for a, b, size in matcher.get_matching_blocks() for i in range(size)}


def _filled(template: str, phrase: str) -> str:
    return "" if is_blank(phrase) else template.replace("{}", phrase)


def _plain(phrase: str) -> str:
    return " ".join(phrase.split()).casefold()
