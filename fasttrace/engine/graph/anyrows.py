"""A traced graph for any number of rows, from two captures that differ in it.

Where both captures hold the same number, the number is the model's; where they differ, it counts
rows, and counts them linearly. So one graph serves every batch shape, and a graph may even have
more rows towards its end than at its beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fasttrace.engine.graph.capture import Graph, make_graph
from fasttrace.errors import ModelError

SMALL, LARGE = 3, 5  # rows of the two captures


@dataclass(frozen=True)
class AnyRows:
    """The same graph at `SMALL` and at `LARGE` rows. `at(rows)` is the graph for any number."""

    small: Graph
    large: Graph

    def __post_init__(self) -> None:
        nodes = zip(self.small.module.graph.nodes, self.large.module.graph.nodes, strict=False)
        same = self.small.reads == self.large.reads and self.small.gives == self.large.gives
        if not same or any((a.op, a.target, a.name) != (b.op, b.target, b.name) for a, b in nodes):
            raise ModelError("The denoiser runs other ops for another number of rows.")

    @classmethod
    def of(cls, make: Callable[[int], Graph]) -> AnyRows:
        """From a function of the number of rows."""
        return cls(make(SMALL), make(LARGE))

    def at(self, rows: int) -> Graph:
        """The graph for `rows` rows."""
        writer = Writer(self)
        for node in self.small.module.graph.nodes:
            writer.copy(node, rows)
        return writer.finish(self.small.reads, self.small.gives)

    @property
    def pairs(self) -> list[tuple[fx.Node, fx.Node]]:
        """Each node in both graphs."""
        return list(zip(self.small.module.graph.nodes, self.large.module.graph.nodes, strict=True))


class Writer:
    """Writes a graph node by node, each for a number of rows of its own."""

    def __init__(self, source: AnyRows) -> None:
        self.twin = dict(source.pairs)
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.mode = FakeTensorMode()

    def copy(self, node: fx.Node, rows: int) -> fx.Node:
        """Append a node of the small graph as it is at `rows` rows."""
        twin = self.twin[node]

        def read(own: Any, other: Any) -> Any:
            if isinstance(own, fx.Node):
                return self.copies[own]
            if isinstance(own, tuple | list):
                return type(own)(read(a, b) for a, b in zip(own, other, strict=True))
            if isinstance(own, dict):
                return {key: read(value, other[key]) for key, value in own.items()}
            return between(own, other, rows)

        args, kwargs = read(tuple(node.args), tuple(twin.args)), read(node.kwargs, twin.kwargs)
        new = self.graph.create_node(node.op, node.target, args, kwargs, node.name)
        new.meta = {"val": self.value(node, rows)}
        self.copies[node] = new
        return new

    def value(self, node: fx.Node, rows: int) -> Any:
        """What the node gives at `rows` rows, as fake tensors."""

        def interpolate(own: Any, other: Any) -> Any:
            if isinstance(own, Tensor):
                shape, stride = (
                    tuple(between(a, b, rows) for a, b in zip(one, two, strict=True))
                    for one, two in ((own.shape, other.shape), (own.stride(), other.stride()))
                )
                with self.mode:
                    return torch.empty_strided(shape, stride, dtype=own.dtype, device=own.device)
            if isinstance(own, tuple | list):
                return type(own)(interpolate(a, b) for a, b in zip(own, other, strict=True))
            return own

        return interpolate(node.meta.get("val"), self.twin[node].meta.get("val"))

    def call(self, op: Any, args: tuple[Any, ...], like: fx.Node | None, rows: int) -> fx.Node:
        """Append an op of our own, whose result looks like that of the small graph's `like`."""
        new = self.graph.call_function(op, args)
        if like is not None:
            new.meta = {"val": self.value(like, rows)}
        return new

    def finish(self, reads: Sequence[str], gives: Sequence[str]) -> Graph:
        return make_graph(self.graph, tuple(reads), tuple(gives))


def between(small: Any, large: Any, rows: int) -> Any:
    """A number of both captures, at `rows` rows."""
    if small == large or not isinstance(small, int) or isinstance(small, bool):
        return small
    each, rest = divmod(large - small, LARGE - SMALL)
    if rest:
        raise ModelError("The denoiser's shapes don't grow with the number of rows.")
    return small + each * (rows - SMALL)


def grows(pair: tuple[fx.Node, fx.Node]) -> bool:
    """Whether a node's first axis is that of the rows, one entry a row.

    Raises `ModelError` where rows stand on another axis, or several entries to a row.
    """
    small: Any = pair[0].meta.get("val")
    large: Any = pair[1].meta.get("val")
    if not isinstance(small, Tensor) or small.shape == large.shape:
        return False
    if (small.shape[0], large.shape[0]) != (SMALL, LARGE) or small.shape[1:] != large.shape[1:]:
        raise ModelError(f"The rows of {pair[0].name} don't lie on its first axis.")
    return True
