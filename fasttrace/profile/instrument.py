"""Compiled graphs, steps and tables with clocks and ranges put into them, from outside.

The engine has no hook for it: what is measured is a copy of its graphs with a call between the
operators, so a run that isn't profiled runs the same code as if this room did not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from fasttrace.engine.compiled import Denoiser, Tables
from fasttrace.engine.first_call import FirstCall
from fasttrace.engine.graph.capture import Graph, copy_of, make_graph
from fasttrace.engine.graph.stairs import stairs
from fasttrace.engine.step import FULL, Step
from fasttrace.profile.recorder import Layout, Recorder
from fasttrace.profile.sites import Label, joined_owners, labels_of, owners

TEXT, STEP = "text part", "step part"
TABLES, GUIDED, CACHE = "reading tables", "guided step", "cache"


@dataclass(frozen=True)
class Timed:
    """A graph with ticks: one before its first operator, one after each label's."""

    graph: Graph
    labels: tuple[Label, ...]


class Instruments:
    """Puts a recorder's clock and ranges into what an engine has compiled.

    kinds: the sites to tell apart, each with its kind.
    """

    def __init__(self, denoiser: Denoiser, kinds: Mapping[str, str], recorder: Recorder) -> None:
        self.denoiser, self.recorder = denoiser, recorder
        self.kinds = {name: kind for name, kind in kinds.items() if name in denoiser.marks}
        self.owner = owners(denoiser.body.small, self.kinds)

    def step(self, step: Step) -> None:
        """Every variant of a step; its runner has to be "eager"."""
        recorder = self.recorder
        around = Label(CACHE if step.cache is not None else TABLES)
        layouts = {}
        for variant, parts in step.parts.items():
            labels = [around, Label(TABLES)]
            for part in parts:
                timed = self.timed(part.graph, self.owner, step.shape.sites)
                part.run = timed.graph.module
                labels += [*timed.labels, Label(GUIDED)]
            name = f"{variant} step of {step.shape.lanes} lanes"
            about = {"rows": step.shape.rows, "flops": step.flops[variant]}
            graphs = [part.graph for part in parts]
            layouts[variant] = Layout(name, (*labels, around), about, graphs)
            step.runners[variant] = recorder.between(step.runners[variant])
        plain, begin = step.run, step.begin

        def run(call: int, variant: str = FULL, record: int = 0) -> None:
            with recorder.step(layouts[variant], call):
                plain(call, variant, record)

        def begin_counted(state: Tensor, call: int = 0) -> None:
            begin(state, call)
            active = (step.index >= 0) & (step.strength != 0)
            recorder.patched = active.sum(-1)

        step.run = run  # type: ignore[method-assign]
        step.begin = begin_counted  # type: ignore[method-assign]

    def first_call(self, climb: FirstCall) -> None:
        """A shared call."""
        recorder = self.recorder
        body = self.denoiser.body
        plain = stairs(body, climb.first, climb.joins)
        owner = joined_owners(plain, body.small, self.owner)
        timed = self.timed(climb.graph, owner)
        about = {"rows": climb.rows, "flops": climb.flops}
        labels = (Label(TABLES), *timed.labels, Label(GUIDED))
        layout = Layout(f"shared call of {climb.rows} rows", labels, about, [climb.graph])
        climb.graph = timed.graph
        run = climb.run

        def timed_run(call: int, *rest: Any) -> Tensor:
            recorder.patched = None
            with recorder.step(layout, call):
                return run(call, *rest)

        climb.run = timed_run  # type: ignore[method-assign, assignment]

    def tables(self, tables: Tables) -> None:
        """The parts that run once a text and once a call: each a label of its own."""
        tables.text_part = self._whole(tables.text_part, TEXT)
        tables.step_part = self._whole(tables.step_part, STEP)

    def timed(self, graph: Graph, owner: Mapping[str, str], points: Sequence[str] = ()) -> Timed:
        """`graph` with a tick after each operator, and a range around each site's.

        points: the sites that are patched in place, in the order of the step's tables.
        """
        labels = labels_of(graph, owner, self.kinds, points)
        new = copy_of(graph.module.graph)
        pairs = list(zip(graph.module.graph.nodes, new.nodes, strict=True))
        places = [node for _, node in pairs if node.op == "placeholder"]
        tick, ranges = self.recorder.tick, self.recorder.ranges
        if tick is not None:
            _after(new, places[-1], tick)
        open_site = ""
        for old, node in pairs:
            label = labels.get(old)
            if label is None and node.op != "output":
                continue
            site = label.site if label is not None else ""
            if ranges is not None and site != open_site:
                with new.inserting_before(node):
                    if open_site:
                        new.call_function(ranges.pop)
                    if site:
                        new.call_function(ranges.push, (site,))
                open_site = site
            if tick is not None and label is not None:
                _after(new, node, tick)
        timed = make_graph(new, graph.reads, graph.gives)
        return Timed(timed, tuple(labels.values()))

    def _whole(self, graph: Graph, name: str) -> Graph:
        """The graph with one label for all of it."""
        each = labels_of(graph, {}, {}).values()
        label = Label(name, flops=sum(x.flops for x in each), bytes=sum(x.bytes for x in each))
        start, stop = self.recorder.around(Layout(name, (label,), {"flops": label.flops}, []))
        new = copy_of(graph.module.graph)
        nodes = list(new.nodes)
        _after(new, [n for n in nodes if n.op == "placeholder"][-1], start)
        with new.inserting_before(nodes[-1]):
            new.call_function(stop)
        return replace(graph, module=make_graph(new, graph.reads, graph.gives).module)


def _after(graph: fx.Graph, node: fx.Node, function: Callable[[], Any]) -> None:
    with graph.inserting_after(node):
        graph.call_function(function)
