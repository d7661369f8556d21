"""A screen of a plan: its pairs in groups, forward together, then one way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrace.adapters.fingerprint import digest
from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.scope import pipeline_modules
from fasttrace.adapters.unet import kind_of
from fasttrace.attribution.backward import Backward
from fasttrace.attribution.encoder import encoder_scores
from fasttrace.attribution.estimators import Base, Estimator
from fasttrace.attribution.forward import run_forward, schedule_of
from fasttrace.attribution.kept import Kept
from fasttrace.attribution.layout import Layout
from fasttrace.attribution.machine import Machine
from fasttrace.attribution.readings import TEXT, Reading, readings_of
from fasttrace.attribution.result import VERSION, Screen, ScreenedPair, joined
from fasttrace.attribution.scores import Question
from fasttrace.attribution.target import Target, target_of
from fasttrace.engine.base import CLEAN, CORRUPT, Pair
from fasttrace.engine.fast import FastEngine
from fasttrace.engine.graph.capture import flatten
from fasttrace.errors import UsageError
from fasttrace.plan.plan import Plan
from fasttrace.types import Probe, Site

LANES = 4
ADDS = ("attn1", "attn2", "ff")  # kinds whose output is added to the stream
_NO_TEXT = ("timestep_cond", "added_cond_kwargs.time_ids")
Progress = Callable[[int, int], None] | None


@dataclass
class Pairs:
    """The pairs of a plan: (probe, seed) and what an engine runs."""

    names: list[tuple[int, int]]
    runs: list[Pair]


@dataclass
class Screener:
    """Screens one plan on a model. Everything runs inside the caller's scope.

    kept: groups of pairs that are in it are not screened again.
    """

    model: Model
    engine: FastEngine
    plan: Plan
    estimator: Estimator
    by: str | Sequence[str] = "site"
    horizon: int | None = None
    lanes: int = LANES
    kept: Kept | None = None
    pairs: list[ScreenedPair] = field(default_factory=list, init=False)  # of a group, as below
    found: dict[str, list[np.ndarray]] = field(default_factory=dict, init=False)
    extra: int = field(default=0, init=False)  # FLOPs outside the denoiser

    def __post_init__(self) -> None:
        plan = self.plan
        if len(plan.metrics) != 1:
            raise UsageError(f"A screen has one metric, not {len(plan.metrics)}.")
        if isinstance(self.lanes, bool) or not isinstance(self.lanes, int) or self.lanes < 1:
            raise UsageError(f"lanes is a whole number of at least 1, not {self.lanes!r}.")
        horizon = self.horizon
        whole = isinstance(horizon, int) and not isinstance(horizon, bool)
        if horizon is not None and not (whole and horizon >= 1):
            raise UsageError(f"A horizon is a number of calls of at least 1, not {horizon!r}.")
        if not isinstance(self.by, str | Sequence) or not self.by:
            raise UsageError(f"by names levels, 'site' or ['site', 'head'], not {self.by!r}.")
        self.levels = [self.by] if isinstance(self.by, str) else list(self.by)
        branch = plan.manifest["branch"] if plan.component == "unet" else "cond"
        self.branches = ("cond", "uncond") if branch == "both" else (str(branch),)
        check_scored(plan)
        self.sites = _sites(plan)
        self.windows = _windows(plan)
        if self.estimator.of_patches and len(self.windows) > 1:
            raise UsageError(
                f"The estimator '{self.estimator.name}' patches in one window, not in "
                f"{len(self.windows)}; screen each by itself, or by plain, nudged or averaged."
            )
        self.of_encoder = plan.component == "text_encoder"
        family = self.model.family
        if self.of_encoder and family.seeded:
            raise UsageError(
                "Between this pipeline's text encoders and its denoiser lies a prior with a loop "
                "of its own, which a screen doesn't go back through; trace its text encoders."
            )

    def run(self, pairs: Pairs, on_progress: Progress = None) -> Screen:
        model, plan = self.model, self.plan
        for part in pipeline_modules(model.pipe).values():
            part.requires_grad_(False)  # gradients in weights would be computed for nothing
        first = pairs.runs[0]
        schedule = schedule_of(model, plan.sampling, first)
        denoiser = self.engine.denoiser(plan.sampling, first.texts[CLEAN])
        workshop = self.engine.workshop
        self.machine = Machine(
            denoiser,
            schedule,
            model.dtype,
            model.device,
            guided=model.guided(plan.sampling),
            guidance=plan.sampling.guidance,
            runner=workshop.runner,
            fused=workshop.fused,
        )
        self.readings = self._readings(pairs)
        question = self._question()
        bases = self._bases(question)
        at_once = max(1, self.lanes // len(bases))
        groups = [slice(i, i + at_once) for i in range(0, len(pairs.runs), at_once)]
        keys = [self._key(pairs.names[group]) for group in groups]
        known = [None if self.kept is None else self.kept.screen(key) for key in keys]
        done, missing = 0, len(pairs.runs) - sum(len(one.pairs) for one in known if one is not None)
        screens = []
        for group, key, found in zip(groups, keys, known, strict=True):
            if found is None:
                found = self._group(question, bases, pairs.names[group], pairs.runs[group])
                if self.kept is not None:
                    self.kept.add_screen(key, found)
                done += len(found.pairs)
                if on_progress is not None:
                    on_progress(done, missing)
            screens.append(found)
        return replace(joined(screens), manifest=self.plan.manifest)

    def _key(self, names: Sequence[tuple[int, int]]) -> str:
        """Of all that decides the scores of a group of pairs."""
        own = set(names)
        rows = [row.key for row in self.plan.rows if (row.probe, row.seed) in own]
        asked = [self.estimator.name, self.horizon, [reading.key for reading in self.readings]]
        return digest([VERSION, rows, *asked])

    def _bases(self, question: Question) -> list[Base]:
        marks = self.machine.denoiser.marks
        modules = self.model.unet_modules().items()
        added = [n for n, m in modules if n in marks and kind_of(n, m) in ADDS]
        bases = self.estimator.bases(question.marks, added)
        if self.estimator.of_patches:
            bases = [replace(base, window=self.windows[0]) for base in bases]
        return bases

    # ---- one group

    def _group(
        self,
        question: Question,
        bases: Sequence[Base],
        names: Sequence[tuple[int, int]],
        runs: Sequence[Pair],
    ) -> Screen:
        machine, plan = self.machine, self.plan
        self.pairs, self.found, self.extra, before = [], {}, 0, machine.flops
        scores: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        for start in range(0, len(bases), self.lanes):
            part = bases[start : start + self.lanes]
            targets, found = self._part(question, part, names, runs)
            for key, value in found.scores.items():
                scores[key] = scores[key] + value if key in scores else value
            for key, value in found.text_gradients.items():
                gradients[key] = gradients[key] + value if key in gradients else value
        turn = 1 if plan.metrics[0].higher_is_closer else -1
        key = plan.metrics[0].key
        for i, ((probe, seed), target) in enumerate(zip(names, targets, strict=True)):
            total = turn * (target.clean - target.corrupt)
            note = ""
            if not bool(target.gradient.any()):
                note = f"{key} is flat at the corrupt run, so it has no slope to go by"
            elif not total > 0:
                note = f"corrupting the subject doesn't lower the score ({key})"
            self.pairs.append(
                ScreenedPair(plan.probes[probe], seed, target.clean, target.corrupt, total, note)
            )
            if self.of_encoder:
                mine = {name: value[i : i + 1] for name, value in gradients.items()}
                self._encoder(plan.probes[probe], runs[i], mine)
        if not self.of_encoder:
            for reading in self.readings:
                self.found.setdefault(reading.key, []).append(scores[reading.key].cpu().numpy())
        calls = machine.schedule.calls
        generation = calls * (1 + machine.guided) * machine.denoiser.cost.whole
        flops = machine.flops - before + self.extra
        return Screen(
            readings=self.readings,
            pairs=tuple(self.pairs),
            scores={key: np.concatenate(parts) for key, parts in self.found.items()},
            branches=self.branches,
            calls=calls,
            windows=self.windows,
            one_window=self.estimator.of_patches,
            estimator=self.estimator.name,
            horizon=self.horizon,
            metric=plan.metrics[0].key,
            flops=flops,
            generations=flops / len(self.pairs) / generation if generation else float("nan"),
            manifest=plan.manifest,
        )

    def _part(
        self,
        question: Question,
        bases: Sequence[Base],
        names: Sequence[tuple[int, int]],
        runs: Sequence[Pair],
    ) -> tuple[list[Target], Any]:
        model, plan, machine = self.model, self.plan, self.machine
        layout = Layout(model, plan.sampling, runs, bases)
        machine.set_texts(layout.given)
        patched = tuple(dict.fromkeys(mark for base in bases for mark in base.patched))
        step = machine.step(len(layout.lanes), patched)
        latents = run_forward(model, plan.sampling, machine.schedule, layout, step, self.branches)
        machine.flops += machine.schedule.calls * step.flops["full"]
        targets = []
        for i, (probe, _) in enumerate(names):
            lanes = [layout.lane(i, base) for base in bases]
            clean, corrupt = latents[-1, 2 * i, None], latents[-1, 2 * i + 1, None]
            target = target_of(
                model, plan.metrics[0], plan.probes[probe], clean, corrupt, latents[-1, lanes]
            )
            self.extra += target.flops
            targets.append(target)
        gradient = torch.cat([target.gradient for target in targets])
        return targets, Backward(machine, layout, question, latents, gradient).run()

    def _encoder(self, probe: Probe, pair: Pair, gradients: dict[str, Tensor]) -> None:
        scores, flops = encoder_scores(
            self.model,
            self.plan.sampling,
            probe,
            self.plan.corruption,
            pair.texts[CLEAN],
            self.sites,
            gradients,
        )
        self.extra += flops
        for reading in self.readings:
            row = scores[reading.site].cpu().numpy()
            self.found.setdefault(reading.key, []).append(row[None, None, None])

    # ---- what is asked

    def _readings(self, pairs: Pairs) -> tuple[Reading, ...]:
        levels = self.levels
        self.texts: tuple[Reading, ...] = ()
        if self.of_encoder or TEXT in levels:
            self.texts = self._text_readings(pairs)
        if self.of_encoder:
            if levels != ["site"]:
                raise UsageError("Text-encoder sites are screened by token; leave `by` out.")
            return tuple(
                Reading(s.name, s.kind, s.index, s.name, "output", "token", s.shape[0], s.shape)
                for s in self.sites
            )
        rest = [level for level in levels if level != TEXT]
        own = readings_of(self.machine.denoiser.marks, self.sites, rest) if rest else ()
        return (*own, *self.texts)

    def _text_readings(self, pairs: Pairs) -> tuple[Reading, ...]:
        """What the denoiser reads of a text and the corruption changes."""
        if self.estimator.of_patches:
            raise UsageError(
                f"The estimator '{self.estimator.name}' patches places of the denoiser and says "
                "nothing of texts; choose plain, nudged or averaged."
            )
        if "cond" not in self.branches:
            raise UsageError("Corruption never touches the unconditional text; screen cond.")
        found: dict[str, Reading] = {}
        for pair in pairs.runs:
            read = [
                flatten(self.model.conditioning(pair.texts[run].alone, self.plan.sampling))
                for run in (CLEAN, CORRUPT)
            ]
            for name, clean in read[0].items():
                if name not in _NO_TEXT and not torch.equal(clean, read[1][name]):
                    shape = tuple(clean.shape[1:])
                    axis, size = (TEXT, shape[0]) if len(shape) == 2 else ("pooled", 1)
                    found[name] = Reading(TEXT, TEXT, -1, name, name, axis, size, shape)
        return tuple(found.values())

    def _question(self) -> Question:
        marked = tuple(r for r in self.readings if r.kind != TEXT)
        return Question(
            () if self.of_encoder else marked,
            self.estimator,
            self.branches,
            self.horizon,
            self.texts,
        )


def pairs_of(
    plan: Plan,
    encode: Callable[[Probe, Any], Pair],
    inside: Callable[[], AbstractContextManager[None]],
) -> Pairs:
    """Every (probe, seed) of a plan, encoded once."""
    names = list(dict.fromkeys((row.probe, row.seed) for row in plan.rows))
    first = {(row.probe, row.seed): row for row in reversed(plan.rows)}
    with inside():
        return Pairs(names, [encode(plan.probes[name[0]], [first[name]]) for name in names])


def check_scored(plan: Plan) -> None:
    """Raises `UsageError` for a plan of patches that a screen has no scores for."""
    for row in plan.rows:
        patches = row.lane.patches
        clean = all(patch.source == "clean" and patch.strength == 1 for patch in patches)
        if plan.base != "corrupt" or len(patches) != 1 or not clean:
            raise UsageError(
                "A screen scores what one place's clean activation, written whole, does in the "
                "corrupt run; other sources, strengths and bases are traced without one."
            )


def _sites(plan: Plan) -> list[Site]:
    """Each once, in the plan's order."""
    patches = (patch for row in plan.rows for patch in row.lane.patches)
    return list(dict.fromkeys(patch.site for patch in patches))


def _windows(plan: Plan) -> tuple[tuple[int, int], ...]:
    found = [row.lane.patches[0].selector.window or (0, plan.calls) for row in plan.rows]
    return tuple(dict.fromkeys(found))
