"""One denoiser call and its ending, compiled for a fixed number of lanes.

All that an experiment is lies in tables: which lane reads which text, which row takes whose
activation, how strongly and at which call. A new plan rewrites numbers at fixed addresses, so one
compiled step serves every plan of its shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.text import Text
from fasttrace.engine.graph.capture import Graph, capture, flatten, tensors_of
from fasttrace.engine.graph.partition import Parts, partition, with_tables
from fasttrace.engine.graph.patches import Point, insert_patches, insert_records, make_tables
from fasttrace.engine.runners import Runner, make_runner
from fasttrace.engine.schedule import Schedule, Slots, advance
from fasttrace.types import Sampling

Sources = Literal["none", "rows", "buffer"]


@dataclass(frozen=True)
class Shape:
    """What a compiled step is fixed to. Everything else of a plan is data.

    lanes: lanes of a batch. guided: every lane has an unconditional row as well. calls: denoiser
    calls of a run. text_slots: different texts a batch may read. sources: where patches read from:
    rows of the same call (a leader lane) or a buffer of recorded activations. recorded: runs and
    branches whose activations a step records, or a buffer holds.
    """

    lanes: int
    guided: bool
    calls: int
    text_slots: int
    sources: Sources
    recorded: int
    records: bool
    height: int
    width: int

    @property
    def rows(self) -> int:
        return self.lanes * (2 if self.guided else 1)


class Step:
    """The compiled call of one `Shape`, with its tables and state.

    Use: `set_texts`, `set_schedule`, fill `index`, `strength` and `slots`, `begin`, then `run` once
    a call.
    """

    def __init__(
        self,
        model: Model,
        shape: Shape,
        sampling: Sampling,
        example: Text,
        sites: Sequence[str],
        slots: Slots,
        runner: str,
    ) -> None:
        self.model, self.shape, self.sampling, self.latent_slots = model, shape, sampling, slots
        self.device, self.dtype = model.device, model.dtype
        self.sites = tuple(sites)
        rows, device = shape.rows, self.device
        inputs = self._inputs(example)
        self.weights = tensors_of(model.unet)
        captured = capture(model.unet, inputs)
        self.parts: Parts = partition(captured, self.weights)
        body = with_tables(self.parts)
        if shape.records:
            body = insert_records(body, self.sites)
        self.points: list[Point] = []
        if shape.sources != "none":
            source: Any = shape.sources
            self.points = [Point(site, source=source) for site in self.sites]
        self.graph: Graph = insert_patches(body, self.points)
        marks = {mark.name: mark for mark in captured.marks}

        def zeros(*size: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        # What the graph reads, at fixed addresses.
        tables = make_tables(
            self.points,
            captured.marks,
            rows,
            sources=shape.recorded * shape.calls if shape.sources == "buffer" else 0,
            dtype=self.dtype,
            device=device,
        )
        self.sources = {s: tables[f"{s}/source"] for s in self.sites if f"{s}/source" in tables}
        self.sample = zeros(*inputs["sample"].shape)
        self.step_row = zeros(rows, dtype=torch.int64)
        texts = [name for name in self.graph.reads if name.startswith("slot:")]
        self.slot = zeros(len(texts), rows, dtype=torch.int64)
        self.slot_names = {name.removeprefix("slot:"): i for i, name in enumerate(texts)}
        self.text_tables = self._empty(self.parts.text, shape.text_slots)
        step_rows = shape.calls * (shape.text_slots if self.parts.step_reads_text else 1)
        self.step_tables = self._empty(self.parts.step, step_rows)
        recorded: dict[str, Tensor] = {}
        self.record: dict[str, Tensor] = {}
        if shape.records:
            which = zeros(shape.recorded, dtype=torch.int64)
            self.record_rows = which
            self.record = {s: zeros(shape.recorded, *marks[s].shape) for s in self.sites}
            recorded = {f"{s}/rows": which for s in self.sites}
            recorded |= {f"{s}/record": tensor for s, tensor in self.record.items()}
        values: dict[str, Tensor] = {
            **self.weights,
            **flatten(inputs),
            **tables,
            **self.text_tables,
            **self.step_tables,
            **recorded,
            **{name: self.slot[i] for i, name in enumerate(texts)},
            "sample": self.sample,
            "step_row": self.step_row,
        }
        self.arguments = [values[name] for name in self.graph.reads]

        # A plan: one entry a call.
        points = len(self.points)
        self.index = torch.full((shape.calls, points, rows), -1, dtype=torch.int64, device=device)
        self.strength = zeros(shape.calls, points, rows, dtype=torch.float32)
        self.slots = zeros(shape.calls, len(texts), rows, dtype=torch.int64)
        self.step_rows = zeros(shape.calls, rows, dtype=torch.int64)
        self._now = tables["index"], tables["strength"]

        # What a run carries from call to call.
        latent = inputs["sample"].shape[1:]
        self.state = zeros(slots.kept, shape.lanes, *latent)
        self.call = zeros(1, dtype=torch.int64)
        self.prediction = zeros(rows, *latent)
        self.noise = zeros(shape.calls, 1, *latent) if slots.noise else None
        weight = torch.float64 if device.type == "cpu" else torch.float32
        self.latent_weights = zeros(shape.calls, slots.count, dtype=weight)
        self.input_scales = zeros(shape.calls + 1, dtype=weight)
        self.linear = True
        self.runner: Runner = make_runner(runner, self.graph.module, self.arguments, self._call)

    # ---- what a run is given

    def set_texts(self, texts: Sequence[Text]) -> None:
        """Fill the text table: slot 0 the unconditional text, then the `texts` in turn."""
        halves: list[dict[str, Tensor]] = []
        for i, text in enumerate(texts):
            found = flatten(self._conditioning(text))
            if i == 0:
                halves.append({n: v[:1] for n, v in found.items()})
            halves.append({n: v[-1:] for n, v in found.items()})
        if len(halves) > self.shape.text_slots:
            raise ValueError(f"{len(halves)} texts, but {self.shape.text_slots} slots.")
        self.filled = len(halves)
        given = {n: torch.cat([half[n] for half in halves]) for n in halves[0]}
        self._fill(self.parts.text, self.text_tables, given, self.filled)
        for name, value in given.items():
            if name == "timestep_cond":  # of the guidance: the same in all rows
                self._timestep_cond = value[:1]

    def set_schedule(self, schedule: Schedule, noise: Tensor | None) -> None:
        """Fill the step table and the weights of the latents. Texts have to be set already."""
        calls, texts = self.shape.calls, self.filled
        timesteps = schedule.timesteps.to(self.device)
        given: dict[str, Tensor] = {}
        if self.parts.step_reads_text:
            # A row is a call with a text: call c and slot s lie at c * slots + s.
            slots = self.shape.text_slots
            of_text = torch.arange(slots, device=self.device).clamp(max=texts - 1).repeat(calls)
            of_call = torch.arange(calls, device=self.device).repeat_interleave(slots)
            given = {n: t[of_text] for n, t in self.text_tables.items()}
            given["timestep"] = timesteps[of_call]
        else:
            given["timestep"] = timesteps
        rows = len(given["timestep"])
        if hasattr(self, "_timestep_cond"):
            given["timestep_cond"] = self._timestep_cond.expand(rows, -1)
        self._fill(self.parts.step, self.step_tables, given, rows)
        self.linear = schedule.linear
        if schedule.linear:
            self.latent_weights.copy_(schedule.weights)
            self.input_scales.copy_(schedule.input_scales)
        if self.noise is not None and noise is not None:
            self.noise.copy_(noise)

    def clear(self) -> None:
        """No patches; every lane reads slot 0 and, where guided, so does its unconditional row."""
        self.index.fill_(-1)
        self.strength.zero_()
        self.slots.zero_()

    def read_texts(self, slots: Sequence[int]) -> None:
        """Every layer of lane i reads text slot `slots[i]`, at every call."""
        rows = torch.tensor(slots, device=self.device)
        if self.shape.guided:
            rows = torch.cat([torch.zeros_like(rows), rows])
        self.slots.copy_(rows)
        calls = torch.arange(self.shape.calls, device=self.device)[:, None]
        if self.parts.step_reads_text:
            self.step_rows.copy_(calls * self.shape.text_slots + rows)
        else:
            self.step_rows.copy_(calls.expand_as(self.step_rows))

    def begin(self, state: Tensor, call: int = 0) -> None:
        """state [kept, lanes, C, h, w]: what the lanes carry into `call`."""
        self.state.copy_(state)
        self.call.fill_(call)
        self.set_input(state[0] * self.input_scales[call] if self.linear else state[0])

    def set_input(self, latents: Tensor) -> None:
        """The denoiser's input [lanes, C, h, w], scaled; both branches see the same."""
        halves = [latents] * (self.shape.rows // self.shape.lanes)
        self.sample.copy_(torch.cat(halves))

    def run(self) -> None:
        """One call. Reads no tensor's value."""
        self.runner()

    # ---- inside

    def _call(self) -> None:
        """The tensor work of one call: what a CUDA graph captures."""
        call = self.call
        for table, now in zip((self.index, self.strength), self._now, strict=True):
            now.copy_(table.index_select(0, call)[0])
        self.slot.copy_(self.slots.index_select(0, call)[0])
        self.step_row.copy_(self.step_rows.index_select(0, call)[0])
        self.prediction.copy_(self.runner.denoise())
        if not self.linear:
            return
        state, scaled = advance(
            self.prediction,
            self.state,
            call,
            self.sampling.guidance if self.shape.guided else None,
            self.noise,
            weights=self.latent_weights,
            input_scales=self.input_scales,
            slots=self.latent_slots,
        )
        self.state.copy_(state)
        self.set_input(scaled)
        call.add_(1)

    def _conditioning(self, text: Text, copies: int = 1) -> dict[str, Any]:
        found = self.model.conditioning(text, self.sampling, copies)
        return {n: v for n, v in found.items() if n != "return_dict"}

    def _inputs(self, text: Text) -> dict[str, Any]:
        shape, config = self.shape, self.model.unet.config
        size = (shape.rows, config.in_channels, shape.height, shape.width)
        return {
            "sample": torch.zeros(size, dtype=self.dtype, device=self.device),
            "timestep": torch.zeros(shape.rows, dtype=torch.int64, device=self.device),
            **self._conditioning(text, shape.lanes),
            "return_dict": False,
        }

    def _empty(self, part: Graph, rows: int) -> dict[str, Tensor]:
        """A part's outputs as tables of `rows` rows."""
        output = next(n for n in part.module.graph.nodes if n.op == "output")
        found = {}
        for name, node in zip(part.gives, output.args[0], strict=True):
            value = node.meta["val"]
            found[name] = torch.zeros(
                (rows, *value.shape[1:]), dtype=value.dtype, device=self.device
            )
        return found

    def _fill(
        self, part: Graph, tables: Mapping[str, Tensor], given: Mapping[str, Tensor], rows: int
    ) -> None:
        """Run a part in portions of the rows it was traced with; the last one is padded."""
        size = self.shape.rows
        for start in range(0, rows, size):
            which = torch.arange(start, start + size, device=self.device).clamp(max=rows - 1)
            values = {n: v.index_select(0, which.clamp(max=len(v) - 1)) for n, v in given.items()}
            found = part({**self.weights, **values})
            for name, value in found.items():
                taken = min(size, rows - start)
                tables[name][start : start + taken] = value[:taken]
