"""What the erase table asks: concepts of the bundled model's world, captions, carriers."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the recipe isn't installed

from sweeps import CALM

from fasttrace.edit.questions import Question, article, misspellings
from recipe.world import GROUNDS, OBJECTS, STYLES, TEMPLATES, Scene, sentence

NOUNS, LOOKS, COLOURS = list(OBJECTS), list(STYLES), list(GROUNDS)
FORMS = [form for forms in TEMPLATES.values() for form in forms]
STYLED = [form for (styled, _), forms in TEMPLATES.items() if styled for form in forms]
ASKED = FORMS[:5] + FORMS[7:9]  # of objects: something follows the noun, so that none is a carrier


@dataclass(frozen=True)
class Concept:
    """target: what it is to become."""

    kind: str  # object, style
    name: str
    target: str

    @property
    def place(self) -> int:
        return (NOUNS if self.kind == "object" else LOOKS).index(self.name)

    @property
    def pair(self) -> tuple[str, str]:
        """As an edit is told: an object with its article, a style as the bare word."""
        if self.kind == "style":
            return self.name, self.target
        return noun(self.name), noun(self.target)


def calm() -> None:
    """Begin anew with threads that sleep while they wait."""
    if any(os.environ.get(name) != value for name, value in CALM.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | CALM)


def concept(name: str) -> Concept:
    """Its target is the next one in the world's own order."""
    kind, names = ("style", LOOKS) if name in LOOKS else ("object", NOUNS)
    return Concept(kind, name, names[(names.index(name) + 1) % len(names)])


# Twenty objects, evenly taken. No target is among them.
TABLE = [concept(NOUNS[i * len(NOUNS) // 20]) for i in range(20)] + [concept(s) for s in LOOKS]
TENS = [[c for c in TABLE if c.kind == "object"][i::2] for i in (0, 1)]
# Settings were chosen on these. Objects that the table doesn't have; of four styles that can't be.
TUNING = [concept(name) for name in ("cat", "apple", "fire engine", "hot dog")]


def some(number: int) -> list[Concept]:
    """So many of the table, evenly taken, at least a quarter of them styles as far as there are."""
    styles = min(len(LOOKS), -(-number // 4))
    objects = len(TABLE) - len(LOOKS)
    taken = [TABLE[i * objects // (number - styles)] for i in range(number - styles)]
    return taken + [TABLE[objects + i * len(LOOKS) // styles] for i in range(styles)]


def noun(name: str) -> str:
    return Scene("flat", "white", object=name).noun


def caption(form: str, name: str, i: int, style: str | None = None) -> str:
    """Style and ground vary with i."""
    style = style or LOOKS[i % len(LOOKS)]
    return sentence(form, Scene(style, COLOURS[2 * i % len(COLOURS)], object=name))


# ---- questions


def questions(of: Concept, removed: bool = False) -> tuple[Question, ...]:
    """8 captions of an object and 18 of others, 12 in a style and 18 in others."""
    edited = 8 if of.kind == "object" else 12
    return _once([*asked(of, edited, removed), *untouched([of], 18)])


def together(of: Sequence[Concept]) -> tuple[Question, ...]:
    """Of several objects at once: 8 captions of each, 40 of others."""
    changed = [question for c in of for question in asked(c, 8 if c.kind == "object" else 12)]
    return _once([*changed, *untouched(of, 40)])


def asked(of: Concept, number: int, removed: bool = False) -> list[Question]:
    """Captions whose picture is to change."""
    n, found = of.place, []
    for i in range(number):
        if of.kind == "object":
            form, j = ASKED[(3 * i + n) % len(ASKED)], i + n
            prompt, swapped = (caption(form, name, j) for name in (of.name, of.target))
        else:
            form, name = STYLED[(3 * i + n) % len(STYLED)], NOUNS[(6 * i + n) % len(NOUNS)]
            prompt, swapped = (caption(form, name, i + n, style) for style in (of.name, of.target))
        found.append(Question("edited", prompt, of.name, of.kind, None if removed else swapped))
    return found


def untouched(of: Sequence[Concept], number: int) -> list[Question]:
    """Captions of other objects (the nearest in the list first), or in other styles."""
    kind, n = of[0].kind, of[0].place
    names = {c.name for c in of}
    if kind == "style":
        others = [name for name in LOOKS if name not in names]
        return [
            _kept(kind, others[j % len(others)], j + n, NOUNS[(4 * j + n + 3) % len(NOUNS)])
            for j in range(number)
        ]
    near = [NOUNS[(c.place + d) % len(NOUNS)] for c in of for d in (1, -1, 2, -2)]
    near = [name for name in dict.fromkeys(near) if name not in names][: number // 4]
    rest = [name for name in NOUNS if name not in names and name not in near]
    left = number - len(near)
    chosen = near + [rest[(j * len(rest) // left + n) % len(rest)] for j in range(left)]
    return [_kept(kind, name, j + n, name) for j, name in enumerate(chosen)]


def _kept(kind: str, phrase: str, i: int, name: str) -> Question:
    styled = kind == "style"
    form = (STYLED if styled else ASKED)[5 * i % 7]
    return Question("neighbour", caption(form, name, i, phrase if styled else None), phrase, kind)


def misspelt(of: Concept) -> tuple[Question, ...]:
    """Five misspellings, each in a caption."""
    found = []
    for question, wrong in zip(asked(of, 5), misspellings(of.name), strict=False):
        prompt = article(_with(question.prompt, of.name, wrong))
        found.append(Question("misspelling", prompt, of.name, of.kind, question.swapped))
    return tuple(found)


def _once(found: Sequence[Question]) -> tuple[Question, ...]:
    return tuple({question.prompt: question for question in found}.values())


def _with(prompt: str, word: str, other: str) -> str:
    """Whole words alone: a car is no cartoon, and pink no ink."""
    return re.sub(rf"\b{re.escape(word)}\b", other, prompt, count=1)


# ---- carriers: sentences with {} for the phrase


def carriers(of: Sequence[Concept], which: str | int) -> tuple[str, ...]:
    """An object's phrase has its article, a style's is the bare word. None is asked, of whatever.

    objects: "short", "prefixes" (all that can stand before one), or those and so many sentences.
    styles: so many sentences, about as many things; an article is right for the style that goes.
    """
    first = of[0]
    found = _object(which) if first.kind == "object" else _style(first.name, int(which))
    known = {_shape(q) for c in of for q in questions(c)} | {_shape(q) for q in together(of)}
    return tuple(c for c in dict.fromkeys(found) if c.replace("an {}", "a {}") not in known)


def _shape(question: Question) -> str:
    """The sentence without its phrase."""
    styled = question.attribute == "style"
    phrase = question.phrase if styled else noun(question.phrase)
    return _with(question.prompt, phrase, "{}").replace("an {}", "a {}")


def _object(which: str | int) -> list[str]:
    plain = ["{}", "a picture of {}", "a drawing of {}"]
    if which == "short":
        return [*plain, "{} in flat style"]
    prompts = [caption(form, "dog", j) for form in FORMS[5:7] for j in range(len(LOOKS))]
    if which != "prefixes":
        prompts += [caption(FORMS[i % 9], "dog", i) for i in range(int(which))]
    return plain + [_with(prompt, "a dog", "{}") for prompt in prompts]


def _style(name: str, number: int) -> list[str]:
    return [
        _with(caption(STYLED[i % 7], NOUNS[(11 * i + 5) % len(NOUNS)], i, name), name, "{}")
        for i in range(number)
    ]
