"""Does the picture show the subject? A classifier's probability of the subject's class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from fasttrace.adapters.selection import suggestion
from fasttrace.errors import UsageError
from fasttrace.types import MetricContext, Probe


class Classifier(Protocol):
    """Several attributes' classifiers in one module."""

    classes: Mapping[str, Sequence[str]]  # attribute -> class names

    def probabilities(self, pictures: Tensor) -> Mapping[str, Tensor]:
        """Pictures [B, 3, H, W] in [0, 1] to attribute -> [B, classes]."""
        ...


class AttributeScorer:
    """Probability x 100 of the class that the probe's subject names.

    `attribute` fixes which classifier is asked; None asks the one of the probe's own attribute.
    """

    def __init__(self, classifier: Classifier, attribute: str | None) -> None:
        if attribute is not None and attribute not in classifier.classes:
            raise UsageError(
                f"There is no classifier for '{attribute}'; there are "
                f"{', '.join(classifier.classes)}.{suggestion(attribute, classifier.classes, n=1)}"
            )
        self.classifier = classifier
        self.attribute = attribute

    def target(self, probe: Probe) -> tuple[str, int]:
        """(attribute, class index) of a probe's subject. `UsageError` if no class fits."""
        classes = self.classifier.classes
        attribute = self.attribute or probe.attribute
        if attribute not in classes:
            raise UsageError(
                f"The probe '{probe.prompt}' has attribute '{attribute}', for which there is no "
                f"classifier; give it one of {', '.join(classes)}."
            )
        return attribute, class_index(probe.subject, classes[attribute])

    def score(self, pictures: Tensor, context: MetricContext) -> Tensor:
        """[B]"""
        attribute, index = self.target(context.probe)
        found: Any = self.classifier.probabilities(pictures)[attribute]
        score: Tensor = 100 * found[:, index]
        return score


def class_index(subject: str, classes: Sequence[str]) -> int:
    """The class a subject names: the same words, else the longest class whose words it contains."""
    words = subject.casefold().split()
    same = [i for i, c in enumerate(classes) if c.casefold().split() == words]
    inside = [i for i, c in enumerate(classes) if set(c.casefold().split()) <= set(words)]
    best = same or sorted(inside, key=lambda i: -len(classes[i]))
    if not best:
        raise UsageError(
            f"No class fits the subject '{subject}'; the classes are {', '.join(classes)}."
            f"{suggestion(subject, classes, n=1)}"
        )
    return best[0]
