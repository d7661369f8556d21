"""What an edit is asked: prompts whose pictures should have changed, and such that shouldn't."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fasttrace.adapters.spans import character_span
from fasttrace.types import Probe

Role = Literal["edited", "paraphrase", "misspelling", "neighbour", "other"]
CHANGED: tuple[Role, ...] = ("edited", "paraphrase", "misspelling")
PARAPHRASES = ("{}", "the {}", "a picture of {}", "a drawing of {}", "a rendering of {}")
MISSPELLINGS = 5


@dataclass(frozen=True)
class Question:
    """phrase: that the prompt is about; swapped: the prompt with the edit's target in its place."""

    role: Role
    prompt: str
    phrase: str
    attribute: str
    swapped: str | None = None


@dataclass(frozen=True)
class Most:
    """How many questions of a kind are asked of a phrase (or, of those unchanged, of an edit)."""

    edited: int = 6
    paraphrases: int = 3
    misspellings: int = MISSPELLINGS
    neighbours: int = 12
    others: int = 12


def build_questions(
    pairs: Sequence[tuple[str, str]],
    probes: Sequence[Probe],
    templates: Sequence[str] = (),
    attributes: Mapping[str, str] | None = None,
    most: Most | None = None,
) -> list[Question]:
    """Questions for an edit of `pairs` (phrase, what it reads as now).

    probes: captions with their subjects. Those of a phrase's own attribute give the surroundings
    it is asked in, and are its neighbours; the rest are other attributes. templates: the edit's
    own, never asked again. attributes: of phrases that are no probe's subject; else unknown phrases
    take every caption.
    """
    most = most or Most()
    olds = [old for old, _ in pairs]
    found: dict[tuple[Role, str], Question] = {}

    def ask(question: Question) -> None:
        # A prompt made for one phrase may be another's neighbour: what changes comes first.
        found.setdefault((question.role, question.prompt), question)

    own: set[str] = set()
    for old, new in pairs:
        attribute = attribute_of(old, probes, attributes or {})
        own.add(attribute)
        around = [p for p in probes if p.attribute == attribute or not attribute]
        for probe in _spread(around, most.edited):
            ask(_about("edited", old, new, attribute, probe))
        asked = [t for t in PARAPHRASES if t not in templates][: most.paraphrases]
        for template in asked:
            swapped = article(template.format(bare(new))) if new else None
            prompt = article(template.format(bare(old)))
            ask(Question("paraphrase", prompt, old, attribute, swapped))
        for probe, wrong in zip(
            _spread(around, 1) * most.misspellings,
            misspellings(bare(old), most.misspellings),
            strict=False,
        ):
            ask(_about("misspelling", old, new, attribute, probe, wrong))
    free = [p for p in probes if not any(_holds(p.prompt, bare(old)) for old in olds)]
    for role, chosen, number in (
        ("neighbour", [p for p in free if p.attribute in own], most.neighbours),
        ("other", [p for p in free if p.attribute not in own], most.others),
    ):
        for probe in _spread(chosen, number):
            ask(Question(role, probe.prompt, probe.subject, probe.attribute))  # type: ignore[arg-type]
    return list(found.values())


def attribute_of(phrase: str, probes: Sequence[Probe], attributes: Mapping[str, str]) -> str:
    """As given, or that of a probe with this subject; "" where neither says."""
    if phrase in attributes:
        return attributes[phrase]
    if bare(phrase) in attributes:
        return attributes[bare(phrase)]
    words = bare(phrase).casefold()
    return next((p.attribute for p in probes if bare(p.subject).casefold() == words), "")


def bare(phrase: str) -> str:
    """Without a leading article: a caption has its own."""
    return re.sub(r"^(?:an?|the)\s+(?=\S)", "", phrase.strip(), flags=re.IGNORECASE)


def article(prompt: str) -> str:
    """ "a owl" is "an owl", "an dog" is "a dog"."""
    prompt = re.sub(r"\b([Aa])n? (?=[aeiou])", r"\1n ", prompt)
    return re.sub(r"\b([Aa])n (?=[^aeiouAEIOU\W])", r"\1 ", prompt)


def misspellings(phrase: str, most: int = MISSPELLINGS) -> list[str]:
    """Typing errors in its longest word: swapped, missing, doubled, wrong letters and a gap."""
    word = max(phrase.split(), key=len)
    middle = len(word) // 2
    if len(word) < 3:
        return [phrase.replace(word, word + word[-1], 1)][:most]
    left, right = word[: middle - 1], word[middle + 1 :]
    a, b = word[middle - 1], word[middle]
    vowel = {"a": "e", "e": "i", "i": "e", "o": "u", "u": "o", "y": "i"}
    at = next((i for i, letter in enumerate(word) if letter in vowel), middle)
    wrong = [
        left + b + a + right,
        left + a + right,
        left + a + b + b + right,
        word[:at] + vowel.get(word[at], "x") + word[at + 1 :],
        word[:middle] + " " + word[middle:],
    ]
    found = [phrase.replace(word, each, 1) for each in wrong if each != word]
    return list(dict.fromkeys(found))[:most]


def _about(
    role: Role, old: str, new: str, attribute: str, probe: Probe, spelt: str | None = None
) -> Question:
    """The probe's caption with the phrase in its subject's place."""
    start, stop = character_span(probe.prompt, probe.subject, probe.occurrence)
    head, tail = probe.prompt[:start], probe.prompt[stop:]
    swapped = article(head + bare(new) + tail) if new else None
    return Question(role, article(head + (spelt or bare(old)) + tail), old, attribute, swapped)


def _holds(prompt: str, phrase: str) -> bool:
    words = r"\s+".join(re.escape(word) for word in phrase.split())
    return re.search(rf"(?<!\w){words}(?!\w)", prompt, re.IGNORECASE) is not None


def _spread(probes: Sequence[Probe], number: int) -> list[Probe]:
    """So many of them, evenly taken."""
    if len(probes) <= number:
        return list(probes)
    return [probes[i * len(probes) // number] for i in range(number)]
