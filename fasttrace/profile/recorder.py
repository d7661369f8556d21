"""Keeps what was measured: intervals by label, spans for a timeline, memory after each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from fasttrace.engine.graph.capture import Graph
from fasttrace.profile.clock import Clock, Ranges, Ticks, now
from fasttrace.profile.records import Span
from fasttrace.profile.sites import Label

MOST_SPANS = 150_000  # what a viewer still opens without waiting
PROFILER = "the profiler"


@dataclass(eq=False)
class Layout:
    """What lies between the ticks of a step: a label for each interval, in order."""

    name: str
    labels: tuple[Label, ...]
    about: Mapping[str, Any]
    graphs: list[Graph]
    executions: int = 0


@dataclass
class Total:
    """calls: intervals. nanoseconds, FLOPs and bytes of all of them."""

    calls: int = 0
    nanoseconds: int = 0
    flops: int = 0
    bytes: int = 0

    def add(self, calls: int, nanoseconds: int, flops: int = 0, moved: int = 0) -> None:
        self.calls += calls
        self.nanoseconds += nanoseconds
        self.flops += flops
        self.bytes += moved


@dataclass
class _Taken:
    layout: Layout
    ticks: list[Any]
    call: int
    patched: Tensor | None
    host: tuple[int, int]


@dataclass
class Recorder:
    """clock: None leaves ranges alone, for NVIDIA's tools. memory: reads the bytes in use."""

    clock: Clock | None
    ranges: Ranges | None = None
    memory: Callable[[], int] | None = None
    totals: dict[Label, Total] = field(default_factory=dict)
    phases: dict[str, Total] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    samples: list[tuple[int, int]] = field(default_factory=list)
    layouts: list[Layout] = field(default_factory=list)
    patched: Tensor | None = None  # rows that each point patches at each call, of the run at hand
    steps: int = 0
    issuing: int = 0  # nanoseconds in which the host issued steps
    left_out: int = 0
    _taken: list[_Taken] = field(default_factory=list)
    _drawn: list[Layout] = field(default_factory=list)

    @property
    def tick(self) -> Callable[[], None] | None:
        return None if self.clock is None else self.clock.tick

    # ---- while it runs

    @contextmanager
    def step(self, layout: Layout, call: int) -> Iterator[None]:
        """A call of a compiled step, whose ticks fill the layout's intervals."""
        with self._range(f"call {call}"):
            if self.clock is None:
                yield
                return
            start = now()
            self.clock.tick()
            try:
                yield
            except BaseException:
                self.clock.take()  # half a step says nothing
                raise
            self.clock.tick()
            self._keep(layout, call, start)
            self.steps += 1
            if self.memory is not None:
                self.samples.append((now(), self.memory()))

    def between(self, runner: Callable[[], None]) -> Callable[[], None]:
        """A step's runner with a tick before and after it."""
        if self.clock is None:
            return runner
        tick = self.clock.tick

        def timed() -> None:
            tick()
            runner()
            tick()

        return timed

    def around(self, layout: Layout) -> tuple[Callable[[], None], Callable[[], None]]:
        """What to call before and after something with one label."""
        started = [0]

        def start() -> None:
            if self.ranges is not None:
                self.ranges.push(layout.name)
            if self.clock is not None:
                started[0] = now()
                self.clock.tick()

        def stop() -> None:
            if self.clock is not None:
                self.clock.tick()
                self._keep(layout, -1, started[0])
            if self.ranges is not None:
                self.ranges.pop()

        return start, stop

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is no step. The device is waited for; phases don't lie in one another."""
        with self._range(name):
            if self.clock is None:
                yield
                return
            self.clock.wait()
            start = now()
            try:
                yield
                self.clock.wait()
            finally:
                stop = now()
                self.phases.setdefault(name, Total()).add(1, stop - start)
                self._span("phase", name, start, stop, {})

    @contextmanager
    def inside(self, kind: str, name: str, **about: Any) -> Iterator[None]:
        """A span that holds others: the run, a batch."""
        with self._range(name):
            start = now()
            try:
                yield
            finally:
                if self.clock is not None:
                    self.clock.wait()
                    self.spans.append(Span(kind, name, start, now(), about))

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*arguments: Any, **keywords: Any) -> Any:
            with self.phase(name):
                return function(*arguments, **keywords)

        return measured

    # ---- afterwards

    def reset(self) -> None:
        """Forget everything so far: what was run to warm up."""
        self.settle()
        for layout in self.layouts:
            layout.executions = 0
        for kept in (self.totals, self.phases, self.spans, self.samples, self.layouts, self._drawn):
            kept.clear()
        self.steps = self.issuing = self.left_out = 0
        if self.clock is not None:
            self.clock.ticks = 0

    def settle(self) -> None:
        """Add up what was taken. Its own time is a phase, so that it is nobody else's."""
        if self.clock is None:
            return
        with self.phase(PROFILER):
            self.clock.wait()
            device = type(self.clock) is not Clock
            for taken in self._taken:
                ticks = self.clock.resolve(taken.ticks)
                self._add(taken, np.diff(ticks))
                self._draw(taken, ticks, device)
            self._taken.clear()

    def _keep(self, layout: Layout, call: int, start: int) -> None:
        assert self.clock is not None
        if not layout.executions:
            self.layouts.append(layout)
        layout.executions += 1
        stop = now()
        self._taken.append(_Taken(layout, self.clock.take(), call, self.patched, (start, stop)))
        if call >= 0:
            self.issuing += stop - start

    def _add(self, taken: _Taken, spent: Ticks) -> None:
        labels = taken.layout.labels
        if len(spent) != len(labels):
            raise RuntimeError(f"{taken.layout.name}: {len(spent)} intervals, {len(labels)} labels")
        patched = taken.patched
        rows = [] if patched is None or taken.call < 0 else patched[taken.call].tolist()
        for label, nanoseconds in zip(labels, spent.tolist(), strict=True):
            moved = label.bytes
            if label.point is not None:
                moved *= rows[label.point]
            total = self.totals.setdefault(label, Total())
            total.add(1, nanoseconds, label.flops, moved)

    def _draw(self, taken: _Taken, ticks: Ticks, device: bool) -> None:
        """Spans of a step: its sites, and in a layout's first execution its operators."""
        layout, at = taken.layout, ticks.tolist()
        if taken.call < 0:
            self._span("phase", layout.name, at[0], at[-1], dict(layout.about), device)
            return
        about = {**layout.about, "step": layout.name}
        self._span("step", f"call {taken.call}", at[0], at[-1], about, device)
        first = layout not in self._drawn
        if first:
            self._drawn.append(layout)
        start = 0
        labels = layout.labels
        for i in range(1, len(labels) + 1):
            if i < len(labels) and _place(labels[i]) == _place(labels[start]):
                continue
            own = labels[start:i]
            name = own[0].site or own[0].kind
            about = {"kind": own[0].kind, "flops": sum(label.flops for label in own)}
            self._span("site", name, at[start], at[i], about, device)
            for k in range(start, i) if first and own[0].op else ():
                label = labels[k]
                more = {"node": label.name, "flops": label.flops, "bytes": label.bytes}
                self._span("op", label.op, at[k], at[k + 1], more, device)
            start = i

    def _span(
        self, kind: str, name: str, start: int, stop: int, about: Mapping[str, Any],
        device: bool = False,
    ) -> None:  # fmt: skip
        if len(self.spans) < MOST_SPANS or kind == "step":
            self.spans.append(Span(kind, name, start, stop, about, device))
        else:
            self.left_out += 1

    @contextmanager
    def _range(self, name: str) -> Iterator[None]:
        with ExitStack() as stack:
            if self.ranges is not None:
                stack.enter_context(self.ranges.inside(name))
            yield


def _place(label: Label) -> tuple[str, str]:
    return label.kind, label.site
