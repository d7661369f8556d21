"""The way back: one call recomputed at a time, gradients at every place that is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fasttrace.attribution.adjoint import Adjoint
from fasttrace.attribution.layout import Layout
from fasttrace.attribution.machine import Machine
from fasttrace.attribution.scaling import gradients
from fasttrace.attribution.scores import Beside, Found, Question, Scores
from fasttrace.engine.base import CLEAN, CORRUPT
from fasttrace.errors import ModelError

INPUT = "the denoiser's input"


@dataclass
class Chain:
    """Gradients on their way back, which count for patches in calls `first` to `last`."""

    first: int
    last: int
    adjoint: Adjoint


class Backward:
    """The way back of one group of pairs.

    latents [T + 1, lanes, C, h, w] of the way forward; gradient [rows, C, h, w]: of the metric in
    the finished latents of each (pair, base).
    """

    def __init__(
        self,
        machine: Machine,
        layout: Layout,
        question: Question,
        latents: Tensor,
        gradient: Tensor,
    ) -> None:
        self.machine, self.layout, self.question = machine, layout, question
        self.latents, self.gradient = latents, gradient
        self.calls, self.device = machine.schedule.calls, machine.device
        self.wide = torch.promote_types(machine.dtype, torch.float32)
        rows = layout.rows
        self.lane_of = self._index([layout.lane(p, base) for p, base in rows])
        cond = [layout.slot(p, base.text) for p, base in rows]
        uncond = [layout.texts.slot(p, "uncond") for p, _ in rows]
        self.slots = self._index([*uncond, *cond] if machine.guided else cond)
        self.patched = tuple(dict.fromkeys(m for base in layout.bases for m in base.patched))
        runs = {base.run for base in layout.bases}
        self.beside = [CLEAN] if CLEAN not in runs else []
        if question.estimator.difference == CORRUPT and CORRUPT not in runs:
            self.beside.append(CORRUPT)
        self.scores = Scores(machine, layout, question)

    def run(self) -> Found:
        calls = self.calls
        horizon = min(self.question.horizon or calls, calls)
        whole = Adjoint(self.machine.schedule, self.gradient.to(self.wide))
        chains = [Chain(calls - horizon, calls - 1, whole.copy())]
        for call in reversed(range(calls)):
            if call < calls - 1 and (first := call - horizon + 1) >= 0:
                chains.append(Chain(first, first, whole.copy()))
            self._call(call, chains)
            chains = [chain for chain in chains if chain.first < call]
            if horizon < calls:
                whole.descend(call)  # later predictions held: nothing is added
        return self.scores.found

    # ---- one call

    def _call(self, call: int, chains: Sequence[Chain]) -> None:
        machine, question = self.machine, self.question
        beside = self._beside(call)
        lanes = len(self.lane_of)
        now = self._input(call, self.lane_of)
        returns = machine.returns(
            len(self.slots), question.marks, self.patched, question.attentions
        )
        state: dict[str, Any] = {}

        def forward() -> dict[str, Tensor]:
            leaf = now.requires_grad_()
            state["leaf"] = leaf
            values = self._values(call, state)
            values["sample"] = torch.cat([leaf] * 2) if machine.guided else leaf
            values |= self._patches(beside, call)
            return returns.graph(values)

        with torch.enable_grad():
            given = machine.counted(("forward", lanes, bool(question.texts)), forward)
        self._check(given, call)
        for i, chain in enumerate(chains):
            scored, onward = call <= chain.last, call > chain.first
            at: dict[str, Tensor] = state["texts"].copy() if scored else {}
            at |= {INPUT: state["leaf"]} if onward else {}
            if scored:
                places = self._places()
                at |= {name: given[name] for name in places if given[name].requires_grad}
            cotangent = self._cotangent(chain.adjoint.descend(call))
            keep = i < len(chains) - 1
            pull = partial(gradients, lanes=lanes, keep=keep)
            where = f"call {call}"
            found: dict[str, Tensor] = machine.counted(
                ("backward", lanes, scored, onward, bool(question.texts)),
                partial(pull, given["prediction"], cotangent, at, where),
            )
            if onward:
                chain.adjoint.add(call, found.pop(INPUT).to(self.wide))
            if scored:
                with torch.no_grad():
                    self.scores.add(call, given, found, beside, returns.scales)

    def _places(self) -> list[str]:
        """Where gradients are taken, in execution order."""
        marks = self.question.marks
        attended = [f"{site}/attended" for site in self.question.attentions]
        return [*dict.fromkeys([*marks, *self.patched]), *attended]

    def _cotangent(self, gradient: Tensor) -> Tensor:
        """In the prediction's rows, of one in the guided prediction."""
        if not self.machine.guided:
            return gradient
        g = self.machine.guidance
        return torch.cat([(1 - g) * gradient, g * gradient])

    def _input(self, call: int, lanes: Tensor) -> Tensor:
        scale = float(self.machine.schedule.input_scales[call])
        latents = self.latents[call].index_select(0, lanes)
        return (latents.to(self.wide) * scale).to(self.machine.dtype)

    def _values(self, call: int, state: dict[str, Any]) -> dict[str, Tensor]:
        state["texts"] = {}
        if not self.question.texts:
            values = self.machine.values(call, self.slots)
            for name in [name for name in values if name.startswith("text:")]:
                # So that what hangs on the text alone, keys and values, has gradients too.
                values[name] = values[name].detach().requires_grad_()
            return values
        given = {n: t.index_select(0, self.slots) for n, t in self.layout.given.items()}
        lanes = len(self.lane_of)
        for reading in self.question.texts:
            rows = given[reading.mark]
            leaf = rows[-lanes:].clone().requires_grad_()
            state["texts"][reading.mark] = leaf
            given[reading.mark] = torch.cat([rows[:-lanes], leaf])
        return self.machine.values_of_texts(call, given)

    def _check(self, given: dict[str, Tensor], call: int) -> None:
        if bool(torch.isfinite(given["prediction"]).all()):
            return
        bad = [n for n in self._places() if not bool(torch.isfinite(given[n]).all())]
        where = bad[0] if bad else "the UNet's last layers"
        raise ModelError(f"A run of the screen gives NaN at {where} in call {call}.")

    # ---- the runs beside

    @torch.no_grad()
    def _beside(self, call: int) -> Beside:
        """(run, branch) -> place -> activations [P, ...] of runs that are no base's."""
        machine, layout, question = self.machine, self.layout, self.question
        pairs = range(len(layout.pairs))
        keys = [(run, branch) for run in self.beside for branch in question.branches]
        if not keys or not (question.marks or self.patched):
            return {}
        lanes, slots = [], []
        for run, branch in keys:
            lanes += [2 * p + (run == CORRUPT) for p in pairs]
            slots += [layout.texts.slot(p, run if branch == "cond" else "uncond") for p in pairs]
        marks = tuple(dict.fromkeys([*question.marks, *self.patched]))
        returns = machine.returns(len(lanes), marks, (), question.attentions)
        values = machine.values(call, self._index(slots))
        values["sample"] = self._input(call, self._index(lanes))
        given = machine.counted(("beside", len(lanes)), lambda: returns.graph(values))
        size = len(pairs)
        return {
            key: {name: t[i * size : (i + 1) * size] for name, t in given.items()}
            for i, key in enumerate(keys)
        }

    def _patches(self, beside: Beside, call: int) -> dict[str, Tensor]:
        """Tables of the patched places: each row reads its pair's clean activation."""
        tables = {}
        branches = self.question.branches
        pairs = len(self.layout.pairs)
        numbers = torch.float64 if self.machine.dtype == torch.float64 else torch.float32
        for place in self.patched:
            index, strength = [], []
            for branch in ("uncond", "cond")[not self.machine.guided :]:
                for pair, base in self.layout.rows:
                    here = branch in branches and place in base.patched and base.acts(call)
                    index.append(branches.index(branch) * pairs + pair if here else -1)
                    strength.append(base.strength if here else 0.0)
            source = torch.cat([beside[CLEAN, branch][place] for branch in branches])
            tables[f"{place}/source"] = source
            tables[f"{place}/index"] = self._index(index)
            tables[f"{place}/strength"] = torch.tensor(strength, dtype=numbers, device=self.device)
        return tables

    def _index(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(list(numbers), dtype=torch.int64, device=self.device)
