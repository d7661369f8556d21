"""Graphs and tables of one denoiser, as a screen calls them: under autograd, a row a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fasttrace.attribution.counting import counting
from fasttrace.attribution.graphs import Returns, returning
from fasttrace.engine.compiled import Denoiser, Tables
from fasttrace.engine.graph.capture import Graph
from fasttrace.engine.runners import Ground
from fasttrace.engine.schedule import Schedule
from fasttrace.engine.step import Shape, Step


class Machine:
    """What outlives the groups of pairs of a screen. `flops` counts what has been executed."""

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        dtype: torch.dtype,
        device: torch.device,
        *,
        guided: bool,
        guidance: float,
        runner: str = "eager",
        fused: bool = False,
    ) -> None:
        self.denoiser, self.schedule, self.dtype, self.device = denoiser, schedule, dtype, device
        self.guided, self.guidance, self.runner, self.fused = guided, guidance, runner, fused
        # Detached: gradients in weights would be computed for nothing.
        self.weights = {name: value.detach() for name, value in denoiser.weights.items()}
        self.tables: Tables | None = None
        self.flops = 0
        self._steps: dict[Any, Step] = {}
        self._graphs: dict[Any, Any] = {}
        self._counts: dict[Any, int] = {}
        self._timestep_cond: Tensor | None = None

    @torch.no_grad()
    def set_texts(self, given: Mapping[str, Tensor]) -> None:
        """given [slots, ...]: what the denoiser reads of every text."""
        slots = len(next(iter(given.values())))
        calls = self.schedule.calls
        if self.tables is None or self.tables.slots < slots:
            self.tables = Tables(self.denoiser, -(-slots // 8) * 8, calls, self.device)
            self._steps.clear()
        before = self.tables.flops
        self.tables.set_schedule(self.schedule.timesteps)
        self.tables.set_texts(0, given)
        self.flops += self.tables.flops - before
        cond = given.get("timestep_cond")
        self._timestep_cond = None if cond is None else cond[:1]

    def step(self, lanes: int, sites: Sequence[str], masked: bool = False) -> Step:
        """The compiled step of the way forward. masked: patches may write some channels alone."""
        key = lanes, tuple(sites), masked
        if key not in self._steps:
            assert self.tables is not None
            self._steps[key] = Step(
                self.denoiser,
                self.tables,
                Shape(lanes, self.guided, tuple(sites), masked=tuple(sites) if masked else ()),
                self.schedule.slots,
                self.guidance,
                self.runner,
                Ground(self.device),
                self.dtype,
                None,
                self.fused and not masked,
            )
        return self._steps[key]

    def returns(
        self,
        rows: int,
        marks: Sequence[str],
        patched: Sequence[str] = (),
        attentions: Sequence[str] = (),
    ) -> Returns:
        """The body at so many rows."""
        key = "body", rows, tuple(marks), tuple(patched), tuple(attentions)

        def make() -> Returns:
            return returning(self.denoiser.body.at(rows), marks, patched, attentions)

        found: Returns = self._kept(key, make)
        return found

    def values(self, call: int, slots: Tensor) -> dict[str, Tensor]:
        """All that a body reads but "sample" and patch tables. slots [rows]: texts."""
        assert self.tables is not None
        return {
            **self.weights,
            **self.tables.text,
            **self.tables.step,
            **self._indices(slots, self.tables.rows(call, slots)),
        }

    def values_of_texts(self, call: int, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same, differentiable in the texts themselves: given [rows, ...], a row a row."""
        assert self.tables is not None
        rows = len(next(iter(given.values())))
        own = torch.arange(rows, device=self.device)
        part = self._kept(("text", rows), lambda: self.denoiser.text.at(rows))
        text = self._run(part, given)
        values = {**self.weights, **self.tables.step, **text}
        if not self.denoiser.step_reads_text:
            return {**values, **self._indices(own, self.tables.rows(call, torch.zeros_like(own)))}
        part = self._kept(("step", rows), lambda: self.denoiser.step.at(rows))
        timestep = self.schedule.timesteps.to(self.device)[call].expand(rows)
        read = {**given, **text, "timestep": timestep}
        if self._timestep_cond is not None:
            read["timestep_cond"] = self._timestep_cond.expand(rows, -1)
        return {**values, **self._run(part, read), **self._indices(own, own)}

    def counted(self, key: Any, run: Callable[[], Any]) -> Any:
        """run(), whose FLOPs are counted the first time and known afterwards."""
        if key in self._counts:
            self.flops += self._counts[key]
            return run()
        with counting() as count:
            found = run()
        self._counts[key] = count.flops
        self.flops += count.flops
        return found

    def _indices(self, slots: Tensor, step_row: Tensor) -> dict[str, Tensor]:
        names = [name for name in self.denoiser.body.small.reads if name.startswith("slot:")]
        return {**dict.fromkeys(names, slots), "step_row": step_row}

    def _run(self, part: Graph, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return part({**self.weights, **given}) if part.gives else {}

    def _kept(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._graphs:
            self._graphs[key] = make()
        return self._graphs[key]
