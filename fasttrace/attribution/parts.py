"""Exact patches of parts of sites: heads, channels, neurons, alone or several in one run.

A part is some channels of a mark of the compiled graph: a head's of the heads' outputs, an
output's or a feed-forward's hidden ones. A lane takes the clean run's values there, in the calls
of a window, and keeps its own elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fasttrace.adapters.pipeline import Model
from fasttrace.attribution.estimators import Base
from fasttrace.attribution.forward import run_forward, schedule_of
from fasttrace.attribution.layout import Layout
from fasttrace.attribution.machine import Machine
from fasttrace.attribution.readings import Reading
from fasttrace.engine.base import CLEAN, CORRUPT, Pair
from fasttrace.engine.fast import FastEngine
from fasttrace.errors import UsageError
from fasttrace.plan.plan import Plan
from fasttrace.plan.windows import Window
from fasttrace.rows import Scorer, decode_in_parts
from fasttrace.types import Probe

AXES = ("head", "channel", "neuron")


@dataclass(frozen=True)
class Part:
    """Channels of one mark."""

    mark: str
    channels: tuple[int, ...]


def part_of(reading: Reading, coordinate: int) -> Part:
    """The part that one score of a screen is of. Raises `UsageError` where it is no channels."""
    if reading.axis not in AXES:
        raise UsageError(f"A {reading.axis} can't be patched as a part: {', '.join(AXES)} can.")
    width = 1
    if reading.axis == "head":
        width = reading.shape[-1] // reading.size
    start = coordinate * width
    return Part(reading.mark, tuple(range(start, start + width)))


class Parts:
    """Exact effects of parts, for the pairs of one plan. Runs inside the caller's scope.

    lanes: patched runs at a time. window: calls in which parts are patched, None is all. `runs`
    counts those that were made, clean and corrupt ones too.
    """

    def __init__(
        self,
        model: Model,
        engine: FastEngine,
        plan: Plan,
        lanes: int = 16,
        window: Window | None = None,
    ) -> None:
        self.model, self.plan, self.lanes, self.runs = model, plan, lanes, 0
        self.window = window
        branch = str(plan.manifest["branch"])
        self.branches = ("cond", "uncond") if branch == "both" else (branch,)
        self._engine = engine
        self._machine: Machine | None = None

    def effects(
        self, probe: Probe, pair: Pair, groups: Sequence[Sequence[Part]]
    ) -> dict[str, np.ndarray]:
        """By metric [len(groups)] float64, in its unit and turned: a run a group."""
        machine = self._ready(pair)
        bases = [_base(group, self.window) for group in groups]
        marks = tuple(dict.fromkeys(mark for base in bases for mark in base.patched))
        found: list[dict[str, float]] = []
        for start in range(0, len(bases), self.lanes):
            some = bases[start : start + self.lanes]
            if start:  # a step is compiled for so many lanes
                some += [some[-1]] * (self.lanes - len(some))
            found += self._some(machine, probe, pair, some, marks)
        names = [metric.key for metric in self.plan.metrics]
        rows = found[: len(groups)]
        return {name: np.array([row[name] for row in rows], np.float64) for name in names}

    def _some(
        self,
        machine: Machine,
        probe: Probe,
        pair: Pair,
        bases: Sequence[Base],
        marks: Sequence[str],
    ) -> list[dict[str, float]]:
        model, plan = self.model, self.plan
        layout = Layout(model, plan.sampling, [pair], bases)
        machine.set_texts(layout.given)
        step = machine.step(len(layout.lanes), marks, masked=True)
        latents = run_forward(model, plan.sampling, machine.schedule, layout, step, self.branches)
        self.runs += len(layout.lanes)
        final = latents[-1]
        drawn = any(metric.needs == "picture" for metric in plan.metrics)
        pictures = decode_in_parts(model, final, plan.sampling) if drawn else None
        scorer = Scorer(model, plan.metrics, probe)
        scorer.add([CLEAN, CORRUPT, *map(str, range(len(bases)))], final, pictures)
        scores = scorer.scores
        turns = {m.key: 1.0 if m.higher_is_closer else -1.0 for m in plan.metrics}
        return [
            {
                key: turn * (scores[str(i)][key] - scores[CORRUPT][key])
                for key, turn in turns.items()
            }
            for i in range(len(bases))
        ]

    def _ready(self, pair: Pair) -> Machine:
        if self._machine is None:
            model, plan = self.model, self.plan
            workshop = self._engine.workshop
            self._machine = Machine(
                self._engine.denoiser(plan.sampling, next(iter(pair.texts.values()))),
                schedule_of(model, plan.sampling, pair),
                model.dtype,
                model.device,
                guided=model.guided(plan.sampling),
                guidance=plan.sampling.guidance,
                runner=workshop.runner,
                fused=workshop.fused,
            )
        return self._machine


def _base(group: Sequence[Part], window: Window | None) -> Base:
    """A corrupt run that takes the group's parts whole."""
    channels: dict[str, tuple[int, ...]] = {}
    for part in group:
        channels[part.mark] = tuple(sorted({*channels.get(part.mark, ()), *part.channels}))
    if not channels:
        raise UsageError("A group of no parts patches nothing.")
    return Base(
        patched=tuple(channels),
        strength=1.0,
        channels=tuple(channels.values()),
        window=window,
    )
