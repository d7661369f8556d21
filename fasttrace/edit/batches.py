"""What is made together when edits are judged: the same every time, so that a run that was stopped
goes on with the pictures that an undisturbed one makes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from fasttrace.edit.edit import Edit
from fasttrace.edit.generate import Order, of_unet
from fasttrace.edit.questions import Question
from fasttrace.store.evaluation import Unit
from fasttrace.types import Sampling

AREA, MOST, LEAST = 1 << 23, 96, 16  # pixels of a batch, and bounds of its pictures
PAIR = 2  # prompts: the engine runs two of an order at least


@dataclass(frozen=True)
class Subject:
    """An edit to judge, by name, and what it is asked."""

    name: str
    edit: Edit
    questions: tuple[Question, ...]

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(q.prompt for q in self.questions))


@dataclass(frozen=True)
class Batch:
    """Pictures of `places`, (prompt, seed) each: unedited, and under every edit asked there.

    The unedited ones and those of edits of text encoders are one run, each edit of a UNet a run.
    """

    places: tuple[tuple[str, int], ...]
    subjects: tuple[Subject, ...]

    def orders(self, done: Collection[Unit] = ()) -> list[tuple[Order, Subject | None]]:
        """Those that aren't done, with the unedited ones they are compared with. A run is made
        whole or not at all: what shares it decides how sums are rounded."""
        left = [s for s in self.subjects if any(unit not in done for unit in self._units(s))]
        if not left:
            return []
        found = self._orders(None)
        for subject in self.subjects:
            if subject in left or not of_unet(subject.edit):
                found += self._orders(subject)
        return found

    def _units(self, subject: Subject) -> list[Unit]:
        asked = set(subject.prompts)
        return [(subject.name, prompt, seed) for prompt, seed in self.places if prompt in asked]

    def _orders(self, subject: Subject | None) -> list[tuple[Order, Subject | None]]:
        asked = None if subject is None else set(subject.prompts)
        by_seed: dict[int, list[str]] = {}
        for prompt, seed in self.places:
            if asked is None or prompt in asked:
                by_seed.setdefault(seed, []).append(prompt)
        edit = None if subject is None else subject.edit
        return [(Order(tuple(own), seed, edit), subject) for seed, own in by_seed.items()]


def batches(subjects: Sequence[Subject], seeds: Sequence[int], sampling: Sampling) -> list[Batch]:
    """Every prompt of the subjects with every seed, in as many batches as it takes."""
    most = max(LEAST, min(MOST, AREA // (sampling.height * sampling.width)))
    of_text: dict[str, int] = {}  # edits of text encoders that are asked a prompt
    for subject in subjects:
        for prompt in subject.prompts:
            of_text[prompt] = of_text.get(prompt, 0) + (not of_unet(subject.edit))
    found: list[Batch] = []
    places: list[tuple[str, int]] = []
    size = 0
    for seed in seeds:
        for prompt, edits in of_text.items():
            if len(places) >= PAIR and size + 1 + edits > most:
                found.append(Batch(tuple(places), tuple(subjects)))
                places, size = [], 0
            places.append((prompt, seed))
            size += 1 + edits
    if places:
        found.append(Batch(tuple(places), tuple(subjects)))
    return found
