"""`evaluate`: did the edits work, and what else moved. Every (edit, prompt, seed) is one lane."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fasttrace.adapters.fingerprint import canonical_json
from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.scope import scope
from fasttrace.edit.edit import Edit
from fasttrace.edit.generate import Order, generate
from fasttrace.edit.questions import Question
from fasttrace.engine.fast import FastEngine
from fasttrace.errors import UsageError
from fasttrace.metrics.attribute import Classifier
from fasttrace.metrics.registry import Metrics
from fasttrace.types import Judgement, Metric, MetricContext, Probe, Sampling

PORTION = 1 << 20  # pixels decoded at a time
Pictures = dict[str, Tensor]  # name -> [3, H, W] in [0, 1] on the CPU


@dataclass(frozen=True)
class Subject:
    """An edit to judge, by name, and what it is asked."""

    name: str
    edit: Edit
    questions: tuple[Question, ...]


@dataclass
class Evaluator:
    """Judges edits of one pipeline, which it leaves as it found it."""

    model: Model
    sampling: Sampling
    metric: Metric
    classifier: Classifier | None = None
    engine: FastEngine = field(init=False)

    def __post_init__(self) -> None:
        self.engine = FastEngine(self.model)

    @classmethod
    def of(cls, pipe: Any, metric: Any = None, **sampling: Any) -> Evaluator:
        """With the model's own defaults, its classifiers where it brings some, and a metric.

        Raises `UsageError` for an unknown metric.
        """
        model = Model(pipe)
        given = {k: v for k, v in sampling.items() if v is not None}
        chosen = Sampling(
            **{n: given.get(n, model.default(n)) for n in ("steps", "guidance", "height", "width")}
        )
        metrics = Metrics(model)
        [found] = metrics.resolve(metric, [])
        if found.needs != "picture":
            raise UsageError(f"'{found.key}' compares latents; an edit is judged by a picture.")
        return cls(model, chosen, found, metrics.classifier())

    def judge(
        self,
        subjects: Sequence[Subject],
        seeds: Sequence[int],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[tuple[list[Judgement], Pictures]]:
        """Judgements with their pictures, as pictures come; first those of the unedited model.

        on_progress: pictures made, pictures in all.
        """
        if not subjects or not seeds:
            raise UsageError("There is nothing to judge: give at least one edit and one seed.")
        every = tuple(dict.fromkeys(q.prompt for s in subjects for q in s.questions))
        orders = [Order(every, seed) for seed in seeds]
        owners: list[Subject | None] = [None] * len(seeds)
        for subject in subjects:
            own = tuple(dict.fromkeys(q.prompt for q in subject.questions))
            orders += [Order(own, seed, subject.edit) for seed in seeds]
            owners += [subject] * len(seeds)
        total, made = sum(len(order.prompts) for order in orders), 0
        before: dict[tuple[str, int], Tensor] = {}
        waiting: list[tuple[Subject, str, int, Tensor]] = []
        for number, places, latents in generate(self.model, self.engine, orders, self.sampling):
            order, owner = orders[number], owners[number]
            for place, picture in zip(places, self._decoded(latents), strict=True):
                prompt = order.prompts[place]
                if owner is None:
                    before[prompt, order.seed] = picture
                else:
                    waiting.append((owner, prompt, order.seed, picture))
            made += len(places)
            if on_progress is not None:
                on_progress(made, total)
            ready = [w for w in waiting if (w[1], w[2]) in before]
            waiting = [w for w in waiting if (w[1], w[2]) not in before]
            for subject, prompt, seed, picture in ready:
                yield self._judged(subject, prompt, seed, before[prompt, seed], picture)

    def _decoded(self, latents: Tensor) -> list[Tensor]:
        at_once = max(1, PORTION // (self.sampling.height * self.sampling.width))
        with scope(self.model.pipe):
            return [p for part in latents.split(at_once) for p in self.model.decode(part).cpu()]

    def _judged(
        self, subject: Subject, prompt: str, seed: int, before: Tensor, after: Tensor
    ) -> tuple[list[Judgement], Pictures]:
        names = (
            picture_name("unedited", self.model.name, prompt, seed),
            picture_name(subject.name, canonical_json(subject.edit.manifest), prompt, seed),
        )
        both = torch.stack([before, after])
        shown = self._shown(both)
        found = []
        for q in (q for q in subject.questions if q.prompt == prompt):
            own = self._scores(both, prompt, q.phrase, q.attribute)
            new: list[Any] = [None, None]
            if q.swapped is not None:
                new = self._scores(both, q.swapped, q.phrase, q.attribute)
            found.append(
                Judgement(
                    edit=subject.name,
                    role=q.role,
                    phrase=q.phrase,
                    attribute=q.attribute,
                    prompt=prompt,
                    seed=seed,
                    metric=self.metric.key,
                    before=own[0],
                    after=own[1],
                    new_before=new[0],
                    new_after=new[1],
                    expected=canonical_json(self._expected(q)),
                    shown_before=canonical_json(shown[0]),
                    shown_after=canonical_json(shown[1]),
                    picture_before=names[0],
                    picture_after=names[1],
                )
            )
        return found, dict(zip(names, both, strict=True))

    def _scores(self, both: Tensor, prompt: str, phrase: str, attribute: str) -> list[float]:
        """A score a picture, as a caption of what `prompt` says."""
        probe = Probe(prompt, phrase, attribute)
        with scope(self.model.pipe):
            given = self.metric.function(
                both.to(self.model.device), MetricContext(probe, both[:1].to(self.model.device))
            )
        return [float(s) for s in torch.as_tensor(given).flatten()]

    def _shown(self, both: Tensor) -> list[dict[str, str]]:
        """Attribute -> class that each picture shows."""
        if self.classifier is None:
            return [{}, {}]
        with torch.no_grad():
            found = self.classifier.probabilities(both.to(self.model.device))
        classes = self.classifier.classes
        return [
            {name: classes[name][int(p[i].argmax())] for name, p in found.items()} for i in (0, 1)
        ]

    def _expected(self, question: Question) -> dict[str, str]:
        """Attribute -> class that a prompt names; a misspelt one means the word it should be."""
        if self.classifier is None:
            return {}
        found = expected(question.prompt, self.classifier.classes)
        own = self.classifier.classes.get(question.attribute, ())
        return found | expected(question.phrase, {question.attribute: own})


def expected(prompt: str, classes: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """For each attribute the class whose words stand in the prompt; the longest of several."""
    found = {}
    for attribute, names in classes.items():
        inside = [
            name
            for name in names
            if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", prompt, re.IGNORECASE)
        ]
        if inside:
            found[attribute] = max(inside, key=len)
    return found


def picture_name(kind: str, model: str, prompt: str, seed: int) -> str:
    """A content hash: a name from data is never a path."""
    return hashlib.sha256(canonical_json([kind, model, prompt, seed]).encode()).hexdigest()[:24]
