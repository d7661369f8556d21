"""`evaluate`: did the edits work, and what else moved. Every (edit, prompt, seed) is one lane."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fasttrace.adapters.fingerprint import canonical_json, digest, module_digest
from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.scope import scope
from fasttrace.edit.batches import Subject, batches
from fasttrace.edit.edit import Edit
from fasttrace.edit.generate import generate
from fasttrace.edit.questions import Question
from fasttrace.engine.fast import FastEngine
from fasttrace.errors import UsageError
from fasttrace.metrics.attribute import Classifier
from fasttrace.metrics.registry import Metrics
from fasttrace.plan.build import sampling_json
from fasttrace.plan.options import parse_choice, parse_sampling, parse_seeds
from fasttrace.rows import decode_in_parts
from fasttrace.store.evaluation import Unit
from fasttrace.types import Judgement, Metric, MetricContext, Probe, Sampling

__all__ = ["Evaluator", "Subject", "expected", "picture_name"]

SAMPLING = ("steps", "guidance", "height", "width")
Pictures = dict[str, Tensor]  # name -> [3, H, W] in [0, 1] on the CPU


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

        sampling: steps, guidance, height, width; None is the model's default. Raises `UsageError`
        for an unknown metric or a wrong number.
        """
        model = Model(pipe)
        for name in sampling:
            parse_choice(name, SAMPLING, "argument")
        given = {name: _plain(sampling.get(name)) for name in SAMPLING}
        chosen = parse_sampling(model, **given, eta=0.0)
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
        done: Collection[Unit] = (),
    ) -> Iterator[tuple[list[Judgement], Pictures]]:
        """Judgements of one picture each, with their pictures, batch by batch as they come.

        on_progress: pictures made, pictures in all. done: what is judged already and not asked
        again; the rest comes out as if it had been. Raises `UsageError` for a wrong call.
        """
        subjects, seeds = _subjects(subjects), _seeds(seeds)
        total, made = self.left(subjects, seeds, done), 0
        _ = self.fingerprint  # before an edit is applied
        for batch in batches(subjects, seeds, self.sampling):
            asked = batch.orders(done)
            orders = [order for order, _ in asked]
            before: dict[tuple[str, int], Tensor] = {}
            waiting: list[tuple[Subject, str, int, Tensor]] = []
            for number, places, latents in generate(self.model, self.engine, orders, self.sampling):
                order, owner = asked[number]
                for place, picture in zip(places, self._decoded(latents), strict=True):
                    prompt = order.prompts[place]
                    if owner is None:
                        before[prompt, order.seed] = picture
                    elif (owner.name, prompt, order.seed) not in done:
                        waiting.append((owner, prompt, order.seed, picture))
                made += len(places)
                if on_progress is not None:
                    on_progress(made, total)
                ready = [w for w in waiting if (w[1], w[2]) in before]
                waiting = [w for w in waiting if (w[1], w[2]) not in before]
                for subject, prompt, seed, picture in ready:
                    yield self._judged(subject, prompt, seed, before[prompt, seed], picture)

    def left(
        self, subjects: Sequence[Subject], seeds: Sequence[int], done: Collection[Unit] = ()
    ) -> int:
        """How many pictures `judge` makes."""
        found = batches(subjects, seeds, self.sampling)
        return sum(len(order.prompts) for batch in found for order, _ in batch.orders(done))

    def question(self, subjects: Sequence[Subject], seeds: Sequence[int]) -> dict[str, Any]:
        """Everything that determines judgements, by names a user knows; JSON-like.

        Not the device, nor the versions of other software.
        """
        judges = self.classifier
        return {
            "model": self.model.name,
            "weights": self.fingerprint,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            **{name: getattr(self.sampling, name) for name in SAMPLING},
            "scheduler": digest(self._sampling)[:12],
            "metric": [self.metric.key, self.metric.fingerprint],
            "classifiers": module_digest(judges) if isinstance(judges, nn.Module) else "",
            "seeds": list(seeds),
            "edits": {s.name: digest(identity(s.edit))[:12] for s in subjects},
            "prompts": digest([[s.name, [vars(q) for q in s.questions]] for s in subjects])[:12],
        }

    @cached_property
    def fingerprint(self) -> str:
        """Of the unedited model."""
        return self.model.fingerprint()

    @cached_property
    def _sampling(self) -> str:
        return sampling_json(self.sampling, self.model.scheduler(self.sampling.steps))

    def _decoded(self, latents: Tensor) -> Tensor:
        with scope(self.model.pipe):
            return decode_in_parts(self.model, latents, self.sampling).cpu()

    def _judged(
        self, subject: Subject, prompt: str, seed: int, before: Tensor, after: Tensor
    ) -> tuple[list[Judgement], Pictures]:
        names = tuple(
            picture_name(self.fingerprint, edit, self._sampling, prompt, seed)
            for edit in (None, subject.edit)
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


def identity(edit: Edit) -> list[Any]:
    """What tells an edit from others: how it was made, and how much of that was kept."""
    return [dict(edit.manifest), {name: c.left.shape[-1] for name, c in edit.changes.items()}]


def picture_name(fingerprint: str, edit: Edit | None, sampling: str, prompt: str, seed: int) -> str:
    """A content hash: a name from data is never a path."""
    made = None if edit is None else identity(edit)
    content = canonical_json([fingerprint, made, sampling, prompt, seed])
    return hashlib.sha256(content.encode()).hexdigest()[:24]


def _subjects(subjects: Any) -> list[Subject]:
    found = list(subjects) if isinstance(subjects, Iterable) else [subjects]
    for subject in found:
        if not isinstance(subject, Subject):
            raise UsageError(
                f"What is judged is a Subject(name, edit, questions); {subject!r} was given."
            )
    if not any(subject.questions for subject in found):
        raise UsageError("There is nothing to judge: give at least one edit with a question.")
    names = [subject.name for subject in found]
    if len(set(names)) < len(names):
        raise UsageError("Two edits have the same name; judgements could not be told apart.")
    return found


def _seeds(seeds: Any) -> tuple[int, ...]:
    several = isinstance(seeds, Iterable) and not isinstance(seeds, str | bytes)
    return parse_seeds([_plain(seed) for seed in seeds] if several else _plain(seeds))


def _plain(value: Any) -> Any:
    """numpy's numbers as Python's."""
    return value.item() if isinstance(value, np.generic) else value
