"""From a metric's name to its record. To add one: write its function, add it to `_named`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fasttrace.adapters.pipeline import Model, embedded_folder
from fasttrace.adapters.selection import suggestion
from fasttrace.errors import FasttraceError, ModelError, UsageError
from fasttrace.metrics import latent
from fasttrace.metrics.attribute import AttributeScorer, Classifier
from fasttrace.metrics.clip import ClipScorer
from fasttrace.plugins import METRICS, brief, plugins
from fasttrace.types import Metric, MetricContext, Probe

DEFAULT = "clip_score"
NAMES = (
    "clip_score",
    "picture_similarity",
    "latent_distance",
    "latent_recovery",
    "attribute",
    "attribute:<object|style|colour|action>",
    "clip:<folder or hub id>",
)
_CLIP = "openai/clip-vit-large-patch14"

Asked = str | Metric | Callable[..., Any]


class Metrics:
    """Metrics for one model; scoring models are loaded once, on first use."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._clips: dict[str, ClipScorer] = {}
        self._classifier: Classifier | None = None

    def resolve(
        self, asked: Asked | Sequence[Asked] | None, probes: Sequence[Probe]
    ) -> tuple[Metric, ...]:
        """Records for what was asked; None is the CLIP score.

        Raises `UsageError` for an unknown name or a probe that a metric has no class for,
        `ModelError` for a scoring model that can't be loaded.
        """
        if asked is None:
            asked = DEFAULT
        many = (
            list(asked) if isinstance(asked, Sequence) and not isinstance(asked, str) else [asked]
        )
        if not many:
            raise UsageError("The list of metrics is empty.")
        found = [self._one(one, probes) for one in many]
        keys = [m.key for m in found]
        if len(set(keys)) != len(keys):
            raise UsageError(f"Two metrics have the same key: {', '.join(keys)}.")
        return tuple(found)

    def classifier(self) -> Classifier | None:
        """The model's own attribute classifiers; None where it brings none."""
        if self._classifier is None and self._beside("classifiers") is not None:
            self._classifier = self._load_classifier()
        return self._classifier

    def _one(self, asked: Asked, probes: Sequence[Probe]) -> Metric:
        if isinstance(asked, Metric):
            return asked
        if callable(asked):
            return from_callable(asked)
        if not isinstance(asked, str):
            raise UsageError(f"A metric is a name, a Metric or a callable; {asked!r} was given.")
        name, _, detail = asked.partition(":")
        if name == "clip" and detail:
            scorer = self._clip(detail)
            label = f"CLIP score ({Path(detail).name})"
            return Metric(
                asked, label, scorer.clip_score, unit="x100", fingerprint=scorer.fingerprint
            )
        if name == "attribute":
            return self._attribute(asked, detail or None, probes)
        make = self._named().get(asked)
        if make is not None:
            return make()
        others = plugins(METRICS)
        if asked in others:
            return self._registered(asked, others[asked])
        names = tuple(dict.fromkeys((*NAMES, *others)))
        raise UsageError(
            f"Unknown metric '{asked}'; expected one of {', '.join(names)}."
            f"{suggestion(asked, names, n=1)}"
        )

    def _registered(self, name: str, found: Any) -> Metric:
        """Another package's: a `Metric`, or a function of the model that makes one."""
        try:
            metric = found if isinstance(found, Metric) else found(self.model)
        except FasttraceError:
            raise
        except Exception as error:
            raise ModelError(f"The registered metric '{name}' fails: {brief(error)}.") from error
        if not isinstance(metric, Metric):
            raise ModelError(
                f"The registered metric '{name}' made a {type(metric).__name__}; expected is a "
                "fasttrace.Metric."
            )
        return replace(metric, function=partial(_guarded, name, metric.function))

    def _named(self) -> dict[str, Callable[[], Metric]]:
        return {
            "clip_score": self._clip_score,
            "picture_similarity": self._similarity,
            "latent_distance": lambda: Metric(
                "latent_distance",
                "distance to the clean latent",
                latent.distance,
                needs="latent",
                unit="rms",
                higher_is_closer=False,
            ),
            "latent_recovery": lambda: Metric(
                "latent_recovery", "recovery of the clean latent", latent.recovery, needs="latent"
            ),
        }

    def _clip_score(self) -> Metric:
        scorer = self._clip(self._default_clip())
        return Metric(
            "clip_score",
            "CLIP score",
            scorer.clip_score,
            unit="x100",
            fingerprint=scorer.fingerprint,
        )

    def _similarity(self) -> Metric:
        scorer = self._clip(self._default_clip())
        return Metric(
            "picture_similarity",
            "similarity to the clean picture in CLIP space",
            scorer.similarity,
            unit="x100",
            fingerprint=scorer.fingerprint,
        )

    def _attribute(self, key: str, attribute: str | None, probes: Sequence[Probe]) -> Metric:
        if self._classifier is None:
            self._classifier = self._load_classifier()
        scorer = AttributeScorer(self._classifier, attribute)
        for probe in probes:
            scorer.target(probe)
        label = f"probability of the {attribute or 'subject'}"
        return Metric(key, label, scorer.score, unit="%", fingerprint=_digest(self._classifier))

    def _clip(self, source: str) -> ClipScorer:
        if source not in self._clips:
            try:
                self._clips[source] = ClipScorer(source, self.model.device)
            except ModelError as error:
                raise ModelError(
                    f"The score's CLIP model: {error} Or choose another metric."
                ) from (error)
        return self._clips[source]

    def _default_clip(self) -> str:
        return str(self._beside("score") or _CLIP)

    def _load_classifier(self) -> Classifier:
        folder = self._beside("classifiers")
        if folder is None:
            raise UsageError(
                f"The model '{self.model.name}' brings no attribute classifiers (only the bundled "
                "one does); choose another metric."
            )
        from fasttrace.embedded.classifier import load_classifier

        try:
            classifier: Any = load_classifier(folder)
        except Exception as error:
            raise ModelError(
                f"The attribute classifiers of '{self.model.name}' are damaged or incomplete: "
                f"{error}. Choose another metric."
            ) from error
        return classifier.to(self.model.device)

    def _beside(self, part: str) -> Path | None:
        """A folder of this name in the model's own, or the bundled model's."""
        own = self.model.folder
        if own is not None and (own / part).is_dir():
            return own / part
        return embedded_folder(part) if self.model.name == "embedded" else None


def from_callable(function: Callable[..., Any]) -> Metric:
    """A metric from any callable of (pictures) or (pictures, context) returning [B] numbers.

    Its key is its name: rows of a changed function look the same to a resumed run, so give a
    `Metric` with a key of its own where that matters.
    """
    name = getattr(function, "__qualname__", type(function).__name__)
    if name.endswith("<lambda>"):
        name = "lambda"
    try:
        takes = [
            p
            for p in inspect.signature(function).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)
            and p.default is p.empty
        ]
    except ValueError:  # builtins without a signature
        takes = []
    alone = len(takes) <= 1 and not any(p.kind is p.VAR_POSITIONAL for p in takes)
    return Metric(f"callable:{name}", name, partial(_call, function) if alone else function)


def _guarded(name: str, function: Callable[..., Any], given: Any, context: MetricContext) -> Any:
    """Another package's function, whose error is no bug of ours. torch's own errors (no memory, no
    gradient) are answered where it is called."""
    try:
        return function(given, context)
    except (FasttraceError, RuntimeError, MemoryError):
        raise
    except Exception as error:
        raise ModelError(
            f"The registered metric '{name}' fails: {brief(error)}. It is called with pictures (or "
            "latents) and a MetricContext."
        ) from error


def _call(function: Callable[..., Any], pictures: Any, _context: MetricContext) -> Any:
    return function(pictures)


def _digest(classifier: Any) -> str:
    from torch import nn

    from fasttrace.adapters.fingerprint import module_digest

    return module_digest(classifier) if isinstance(classifier, nn.Module) else ""
