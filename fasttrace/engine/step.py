"""One denoiser call and its ending, compiled for a fixed number of lanes.

All that an experiment is lies in tables: which lane reads which text, which row takes whose
activation, how strongly and at which call. A new plan rewrites numbers at fixed addresses, so one
compiled step serves every plan of its shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttrace.engine.cache import Cache
from fasttrace.engine.compiled import Denoiser, Tables
from fasttrace.engine.flops import count
from fasttrace.engine.graph.capture import Graph
from fasttrace.engine.graph.fuse import fuse_attention
from fasttrace.engine.graph.patches import Point, insert_patches, insert_records, make_tables
from fasttrace.engine.graph.prune import prune
from fasttrace.engine.runners import Ground, Runner, make_runner
from fasttrace.engine.schedule import Schedule, Slots
from fasttrace_kernels import guided_step_

FULL, PRUNED = "full", "pruned"


@dataclass(frozen=True)
class Shape:
    """What a compiled step is fixed to. Everything else of a plan is data.

    lanes: lanes of a batch. guided: every lane has an unconditional row as well. sites: where
    patches may be. cached: those of them that read the cache; the others read rows of the same call
    (a leader lane). masked: those where a patch may write some channels alone. added: cached ones
    at which rows of the cache may be added. recorded: sites of which `records` rows go into the
    cache. pruned: a site that all conditional rows take from the cache, so that what only fed it is
    not computed.
    """

    lanes: int
    guided: bool
    sites: tuple[str, ...] = ()
    cached: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    recorded: tuple[str, ...] = ()
    records: int = 0
    pruned: str | None = None
    masked: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return self.lanes * (2 if self.guided else 1)


@dataclass
class Part:
    """A graph that computes some rows of the prediction, with the tensors it reads, in order."""

    graph: Graph
    run: Callable[..., Any]
    rows: slice
    arguments: list[Tensor]


class Step:
    """The compiled call of one `Shape`, with its tables and state.

    Use: `set_schedule`, fill `index`, `strength` and the texts, `begin`, then `run(call)` for every
    call. A step with a pruned site has two variants, "pruned" and "full" (outside the window).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        tables: Tables,
        shape: Shape,
        latent_slots: Slots,
        guidance: float,
        runner: str,
        ground: Ground,
        dtype: torch.dtype,
        cache: Cache | None = None,
        fused: bool = False,
    ) -> None:
        self.denoiser, self.tables, self.shape = denoiser, tables, shape
        self.latent_slots, self.cache, self.fused = latent_slots, cache, fused
        self.device, self.dtype, calls = tables.device, dtype, tables.calls
        rows, lanes, device = shape.rows, shape.lanes, self.device

        def zeros(*size: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        # What the graphs read in a call, at fixed addresses.
        self.points = [
            Point(
                site,
                mask="channels" if site in shape.masked else "none",
                source="buffer" if site in shape.cached else "rows",
                adds=site in shape.added,
            )
            for site in shape.sites
        ]
        now = make_tables(
            self.points,
            list(denoiser.marks.values()),
            rows,
            sources=0,
            dtype=dtype,
            device=device,
        )
        self._now = now["index"], now["strength"]
        # [rows, 1, C] or [rows, C]: factors of the strength, the same in every call
        self.masks = {site: now[f"{site}/mask"] for site in shape.masked}
        self.sample = zeros(rows, *denoiser.latent)
        self.step_row = zeros(rows, dtype=torch.int64)
        names = [name for name in denoiser.body.small.reads if name.startswith("slot:")]
        self.slot_names = {name.removeprefix("slot:"): i for i, name in enumerate(names)}
        self.slot = zeros(len(names), rows, dtype=torch.int64)
        self.record_rows = zeros(shape.records, dtype=torch.int64)
        staged = cache is not None and cache.staged
        self.records = {
            site: zeros(shape.records if staged else 0, *denoiser.marks[site].shape)
            for site in shape.recorded
        }
        self.values: dict[str, Tensor] = {
            **denoiser.weights,
            **tables.text,
            **tables.step,
            **{n: t for n, t in now.items() if "/" in n and not n.endswith("/source")},
            **{f"{site}/rows": self.record_rows for site in shape.recorded},
        }

        # A plan: one entry a call.
        points = len(self.points)
        self.index = torch.full((calls, points, rows), -1, dtype=torch.int64, device=device)
        self.strength = zeros(calls, points, rows, dtype=now["strength"].dtype)
        self.add_index = zeros(calls, len(shape.added), rows, dtype=torch.int64)
        self.add_scale = zeros(calls, len(shape.added), rows, dtype=torch.float32)
        self._added_now = [
            (now[f"{site}/add_index"], now[f"{site}/add_scale"]) for site in shape.added
        ]
        self.slots = zeros(calls, len(names), rows, dtype=torch.int64)
        self.step_rows = zeros(calls, rows, dtype=torch.int64)

        # What a run carries from call to call.
        self.state = zeros(latent_slots.kept, lanes, *denoiser.latent)
        self.counter = zeros(2, dtype=torch.int64)
        self.call = self.counter[:1]  # the other entry is `guided_step_`'s own
        self.prediction = zeros(rows, *denoiser.predicted)
        self.noise = zeros(calls, lanes, *denoiser.latent) if latent_slots.noise else None
        weight = torch.float64 if device.type == "cpu" else torch.float32
        self.latent_weights = zeros(calls, latent_slots.count, dtype=weight)
        self.input_scales = zeros(calls + 1, dtype=weight)
        self.guidance = zeros(1, dtype=weight).fill_(guidance) if shape.guided else None
        self.linear = True

        self.parts: dict[str, list[Part]] = {FULL: [self._part(self._full(), slice(0, rows))]}
        if shape.pruned is not None:
            cond = slice(lanes if shape.guided else 0, rows)
            self.parts[PRUNED] = [self._part(prune(self._body(lanes), shape.pruned), cond)]
            if shape.guided:
                plain = insert_patches(self._body(lanes), [])
                self.parts[PRUNED].insert(0, self._part(plain, slice(0, lanes)))
        compiled = runner == "compile"
        for parts in self.parts.values():
            for part in parts:
                part.run = (
                    torch.compile(part.graph.module, dynamic=False)
                    if compiled
                    else (part.graph.module)
                )
        self.runners: dict[str, Runner] = {
            variant: make_runner(runner, lambda v=variant: self._call(v), ground)  # type: ignore[misc]
            for variant in self.parts
        }
        self.ran = 0  # FLOPs of the last call
        self.flops = {v: sum(count(p.graph) for p in parts) for v, parts in self.parts.items()}

    # ---- what a run is given

    def set_schedule(self, schedule: Schedule) -> None:
        """The weights of the latents."""
        self.linear = schedule.linear
        if schedule.linear:
            self.latent_weights.copy_(schedule.weights)
            self.input_scales.copy_(schedule.input_scales)

    def clear(self) -> None:
        """No patches."""
        self.index.fill_(-1)
        self.strength.zero_()
        self.add_index.zero_()
        self.add_scale.zero_()
        for mask in self.masks.values():
            mask.fill_(1.0)

    def read_texts(self, uncond: Sequence[int], cond: Sequence[int]) -> None:
        """Every layer of lane i reads text slot `cond[i]`, its unconditional row `uncond[i]`."""
        both = [*uncond, *cond] if self.shape.guided else list(cond)
        rows = torch.tensor(both, device=self.device)
        self.slots.copy_(rows)
        calls = torch.arange(self.tables.calls, device=self.device)[:, None]
        self.step_rows.copy_(self.tables.rows(calls, rows.expand(len(calls), -1)))

    def begin(self, state: Tensor, call: int = 0) -> None:
        """state [kept, lanes, C, h, w]: what the lanes carry into `call`."""
        self.state.copy_(state)
        self.call.fill_(call)
        self.set_input(state[0] * self.input_scales[call] if self.linear else state[0])
        if self.cache is not None:
            self.cache.begin()

    def set_input(self, latents: Tensor) -> None:
        """The denoiser's input [lanes, C, h, w], scaled; both branches see the same."""
        for start in range(0, self.shape.rows, self.shape.lanes):
            self.sample[start : start + self.shape.lanes].copy_(latents)

    def row(self, branch: str, lane: int) -> int:
        """A lane's row in the denoiser's batch: unconditional rows first."""
        return lane + self.shape.lanes * (self.shape.guided and branch == "cond")

    def run(self, call: int, variant: str = FULL, record: int = 0) -> None:
        """One call, whose number the device knows as well. Reads no tensor's value.

        record: the first of the cache's rows that the step's records go to.
        """
        cache = self.cache
        self.ran = self.flops[variant]
        if cache is None:
            self.runners[variant]()
            return
        stop = record + self.shape.records
        if self.shape.cached:
            cache.before(call)
        if not cache.staged:
            # Nothing is captured, so a call's rows are read and written where they lie.
            self._bind("source", variant, lambda site: cache.source(site, call))
            self._bind("record", variant, lambda site: cache.target(site, call, record, stop))
        self.runners[variant]()
        if self.shape.cached:
            cache.after(call)
        if cache.staged:
            for site, rows in self.records.items():
                cache.target(site, call, record, stop).copy_(rows, non_blocking=True)

    # ---- inside

    def _call(self, variant: str) -> None:
        """The tensor work of one call: what a CUDA graph captures."""
        call = self.call
        for table, now in zip((self.index, self.strength), self._now, strict=True):
            now.copy_(table.index_select(0, call)[0])
        for point, (index, scale) in enumerate(self._added_now):
            index.copy_(self.add_index[:, point].index_select(0, call)[0])
            scale.copy_(self.add_scale[:, point].index_select(0, call)[0])
        self.slot.copy_(self.slots.index_select(0, call)[0])
        self.step_row.copy_(self.step_rows.index_select(0, call)[0])
        for part in self.parts[variant]:
            self.prediction[part.rows].copy_(part.run(*part.arguments)[0])
        if not self.linear:
            return
        guided_step_(
            self.prediction,
            self.state,
            self.sample,
            self.counter,
            self.latent_weights,
            self.input_scales,
            self.guidance,
            self.noise,
            self.latent_slots.latents,
        )

    def _body(self, rows: int) -> Graph:
        return self.denoiser.body.at(rows)

    def _full(self) -> Graph:
        body = self._body(self.shape.rows)
        if self.shape.recorded:
            body = insert_records(body, self.shape.recorded)
        return insert_patches(body, self.points)

    def _part(self, graph: Graph, rows: slice) -> Part:
        graph = fuse_attention(graph) if self.fused else graph
        return Part(graph, graph.module, rows, [self._argument(name, rows) for name in graph.reads])

    def _argument(self, name: str, rows: slice) -> Tensor:
        kind, _, rest = name.partition(":")
        if name == "sample":
            return self.sample[rows]
        if name == "step_row":
            return self.step_row[rows]
        if kind == "slot":
            return self.slot[self.slot_names[rest]][rows]
        site, _, table = name.rpartition("/")
        if table == "source":
            assert self.cache is not None
            return self.cache.source(site, 0)
        if table == "record":
            return self.records[site]
        if table in ("index", "strength", "mask", "add_index", "add_scale"):
            return self.values[name][rows]
        return self.values[name]

    def _bind(self, table: str, variant: str, tensor: Callable[[str], Tensor]) -> None:
        for part in self.parts[variant]:
            for i, name in enumerate(part.graph.reads):
                if name.endswith(f"/{table}"):
                    part.arguments[i] = tensor(name.rpartition("/")[0])
