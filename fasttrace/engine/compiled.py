"""A denoiser compiled for any number of rows: what runs once a text, once a call, once a step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.text import Text
from fasttrace.engine.flops import count
from fasttrace.engine.graph.anyrows import LARGE, SMALL, AnyRows
from fasttrace.engine.graph.capture import Graph, capture, flatten, tensors_of
from fasttrace.engine.graph.marks import Mark
from fasttrace.engine.graph.partition import partition, with_tables
from fasttrace.engine.graph.prune import Cost, cost_of
from fasttrace.engine.graph.stairs import stairs
from fasttrace.engine.memory import peak_bytes
from fasttrace.errors import ModelError
from fasttrace.types import Sampling

_log = logging.getLogger(__name__)

PORTION = 16  # texts, or calls, that the once-a-text and once-a-call parts take at a time


@dataclass(frozen=True)
class Denoiser:
    """Graphs of one denoiser. `body` reads tables that `text` and `step` fill.

    keys: the mark that each text value meets in the body. cost: FLOPs of a row of the body;
    text_cost and step_cost those of a row of the other parts.
    """

    weights: Mapping[str, Tensor]
    text: AnyRows
    step: AnyRows
    body: AnyRows
    keys: Mapping[str, str]
    marks: Mapping[str, Mark]
    latent: tuple[int, ...]
    predicted: tuple[int, ...]  # more channels than the latent where a variance is learned
    inputs: tuple[str, ...]  # tensors it reads, by their flattened names
    shareable: bool  # whether rows can join on the way: all tensors have them on their first axis
    cost: Cost
    text_cost: int
    step_cost: int
    _active: dict[int, int] = field(default_factory=dict, repr=False)

    def active_bytes(self, rows: int) -> int:
        """What the body's own tensors take at most. Kept: a graph of so many rows takes long."""
        if rows not in self._active:
            self._active[rows] = peak_bytes(self.body.at(rows))
        return self._active[rows]

    @property
    def step_reads_text(self) -> bool:
        """Whether a row of the step table is a call with a text (SDXL's pooled vector)."""
        return any(name.startswith("text:") for name in self.step.small.reads)


def compile_denoiser(
    unet: nn.Module,
    inputs: Callable[[int], Mapping[str, Any]],
    device: torch.device | None = None,
    channels: int | None = None,
) -> Denoiser:
    """Trace `unet` twice and split it. inputs(rows): its keyword arguments for so many rows.

    channels: how many of the prediction's are kept; None is all. Raises `ModelError` as `capture`
    does, and where its ops depend on the number of rows.
    """
    weights = tensors_of(unet)
    captured = AnyRows.of(lambda rows: capture(unet, inputs(rows), device, channels))
    small, large = (partition(graph, weights) for graph in (captured.small, captured.large))
    body = AnyRows(with_tables(small), with_tables(large))
    text, step = AnyRows(small.text, large.text), AnyRows(small.step, large.step)
    given = flatten(inputs(SMALL))
    return Denoiser(
        weights=weights,
        text=text,
        step=step,
        body=body,
        keys=small.keys,
        marks={mark.name: mark for mark in captured.small.marks},
        latent=tuple(given["sample"].shape[1:]),
        predicted=_predicted(body),
        inputs=tuple(given),
        shareable=_shareable(body),
        cost=cost_of(body),
        text_cost=_each(text),
        step_cost=_each(step),
    )


def _predicted(body: AnyRows) -> tuple[int, ...]:
    output = next(n for n in body.small.module.graph.nodes if n.op == "output")
    return tuple(output.args[0][0].meta["val"].shape[1:])


def _shareable(body: AnyRows) -> bool:
    sites = [mark.name for mark in body.small.marks if mark.kind == "output"]
    try:
        stairs(body, 2, dict.fromkeys(sites, 1))
    except ModelError:
        _log.warning("this attention keeps rows on other axes, so first calls are not shared")
        return False
    return True


def of_model(model: Model, sampling: Sampling, example: Text) -> Denoiser:
    """The compiled denoiser of a loaded pipeline, for texts shaped like `example`."""
    size = model.latent_shape(sampling)
    alone = example.alone

    def inputs(rows: int) -> dict[str, Any]:
        return {
            "sample": torch.zeros(rows, *size, dtype=model.dtype, device=model.device),
            "timestep": torch.zeros(rows, dtype=torch.int64, device=model.device),
            **model.conditioning(alone, sampling, rows),
        }

    return compile_denoiser(model.unet, inputs, channels=model.family.kept_channels())


class Tables:
    """Keys and values of texts, time embeddings of calls: tables that steps of any shape read.

    A text lies in a slot; where pooled text enters, call c with slot s has row `c * slots + s` of
    the step table, else call c has row c. `flops` counts what filling them has cost.
    """

    def __init__(self, denoiser: Denoiser, slots: int, calls: int, device: torch.device) -> None:
        self.denoiser, self.slots, self.calls, self.device = denoiser, slots, calls, device
        self.text_part, self.step_part = denoiser.text.at(PORTION), denoiser.step.at(PORTION)
        self.text = self._empty(self.text_part, slots)
        self.step = self._empty(self.step_part, calls * (slots if denoiser.step_reads_text else 1))
        self.flops = 0
        self._timesteps = torch.zeros(calls, device=device)
        self._timestep_cond: Tensor | None = None

    def set_schedule(self, timesteps: Tensor) -> None:
        """timesteps [calls]. To be called before texts are set, and anew at every run."""
        self._timesteps = timesteps.to(self.device)
        self._timestep_cond = None
        if not self.denoiser.step_reads_text and "timestep_cond" not in self.denoiser.inputs:
            self._fill_steps(torch.arange(self.calls, device=self.device), {})

    def set_texts(self, start: int, given: Mapping[str, Tensor]) -> None:
        """Put texts into the slots from `start` on; given [n, ...]: what the denoiser reads.

        The weights are read at this moment, so an edit in place is seen by the next run.
        """
        count_of = len(next(iter(given.values())))
        if start + count_of > self.slots:
            raise ValueError(f"{start + count_of} texts, but {self.slots} slots.")
        self._fill(self.text_part, self.text, given, torch.arange(start, start + count_of))
        denoiser = self.denoiser
        new_cond = "timestep_cond" in given and self._timestep_cond is None
        if new_cond:  # of the guidance: the same in all rows of a run
            self._timestep_cond = given["timestep_cond"][:1]
        if denoiser.step_reads_text:
            calls = torch.arange(self.calls, device=self.device).repeat_interleave(count_of)
            slots = torch.arange(start, start + count_of, device=self.device).repeat(self.calls)
            read = self.step_part.reads
            of_text = {name: table[slots] for name, table in self.text.items() if name in read}
            self._fill_steps(calls, of_text, rows=calls * self.slots + slots)
        elif new_cond:
            self._fill_steps(torch.arange(self.calls, device=self.device), {})

    def rows(self, call: int | Tensor, slots: Tensor) -> Tensor:
        """Rows of the step table for a call and text slots."""
        if self.denoiser.step_reads_text:
            return call * self.slots + slots
        return torch.zeros_like(slots) + call

    def _fill_steps(
        self, calls: Tensor, given: Mapping[str, Tensor], rows: Tensor | None = None
    ) -> None:
        given = {**given, "timestep": self._timesteps[calls]}
        if self._timestep_cond is not None:
            given["timestep_cond"] = self._timestep_cond.expand(len(calls), -1)
        self._fill(self.step_part, self.step, given, calls if rows is None else rows)

    def _fill(
        self, part: Graph, tables: Mapping[str, Tensor], given: Mapping[str, Tensor], rows: Tensor
    ) -> None:
        """Run a part in portions of the rows it was compiled for; the last one is padded."""
        if not tables:
            return
        each = count(part)
        given = {name: value for name, value in given.items() if name in part.reads}
        for start in range(0, len(rows), PORTION):
            which = torch.arange(start, start + PORTION, device=self.device)
            which = which.clamp(max=len(rows) - 1)
            values = {name: value.index_select(0, which) for name, value in given.items()}
            found = part({**self.denoiser.weights, **values})
            self.flops += each
            place = rows[start : start + PORTION].to(self.device)
            for name, value in found.items():
                tables[name].index_copy_(0, place, value[: len(place)])

    def _empty(self, part: Graph, rows: int) -> dict[str, Tensor]:
        output = next(n for n in part.module.graph.nodes if n.op == "output")
        found = {}
        for name, node in zip(part.gives, output.args[0], strict=True):
            value = node.meta["val"]
            found[name] = torch.zeros(
                (rows, *value.shape[1:]), dtype=value.dtype, device=self.device
            )
        return found


def portions(rows: int) -> int:
    """How many times a part runs to fill so many rows."""
    return -(-rows // PORTION)


def _each(part: AnyRows) -> int:
    """FLOPs of one row."""
    return (count(part.large) - count(part.small)) // (LARGE - SMALL)
