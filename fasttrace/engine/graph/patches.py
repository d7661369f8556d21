"""Patches as data: patch ops at marked nodes, reading tables that the engine owns.

The graph is built once; which row reads what, how strongly and where in it are numbers in tables at
fixed addresses. No table entry, no change: an index of -1 leaves a row bit for bit as it was.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

import fasttrace_kernels  # noqa: F401  registers the patch ops
from fasttrace.engine.graph.capture import Graph, copy_of, make_graph
from fasttrace.engine.graph.marks import MARK, Mark
from fasttrace.errors import UsageError

aten = torch.ops.aten
MaskKind = Literal["none", "tokens", "channels", "places", "elements"]


@dataclass(frozen=True)
class Point:
    """A patch op at the mark called `site`, and the tables it reads.

    `<site>/index` [B] int64: the row of the source that each row takes, or -1.
    `<site>/strength` [B] float32 (float64 of a float64 model). `<site>/mask`, unless the mask is
    "none": factors of the strength, see `mask_shape`. `<site>/source` [S, ...] where the source is
    "buffer"; where it is "rows", the site's own rows of this very call are the source. With `adds`,
    to what is there then `<site>/add_scale` [B] times row `<site>/add_index` [B] int64 of the
    buffer is added.
    """

    site: str
    mask: MaskKind = "none"
    source: Literal["buffer", "rows"] = "buffer"
    adds: bool = False

    @property
    def tables(self) -> tuple[str, ...]:
        parts = ["index", "strength"]
        parts += ["mask"] if self.mask != "none" else []
        parts += ["source"] if self.source == "buffer" else []
        parts += ["add_index", "add_scale"] if self.adds else []
        return tuple(f"{self.site}/{part}" for part in parts)


def insert_patches(graph: Graph, points: Sequence[Point], *, differentiable: bool = False) -> Graph:
    """`graph` with a patch op at every point and no marks; it reads the points' tables as well.

    In inference graphs the op writes in place where nothing else can see it, and into a copy
    elsewhere (a tensor that another op still reads). `differentiable` graphs write into copies
    throughout and have gradients in strengths and masks.

    Raises `UsageError` for a point that is no mark of the graph, or named twice.
    """
    new = copy_of(graph.module.graph)
    wanted = _by_site(graph, points)
    tables = _Tables(new, graph.reads)
    order = {node: i for i, node in enumerate(new.nodes)}
    for node in [n for n in new.nodes if n.target is MARK]:
        source, name = node.args[0], node.args[1]
        result = source
        if (point := wanted.get(name)) is not None:
            read = {key.rpartition("/")[2]: tables.read(key) for key in point.tables}
            arguments = (
                source,
                read.get("source", source),
                read["index"],
                read["strength"],
                read.get("mask"),
            )
            alone = not differentiable and _alone(source, node, order)
            ops = torch.ops.fasttrace
            op = ops.patch_rows_.default if alone else ops.patch_rows.default
            with new.inserting_before(node):
                patched = new.call_function(op, arguments)
            order[patched] = order[node]
            if not alone:
                patched.meta["val"] = node.meta["val"]
                result = patched
            if point.adds:
                result = _add(new, node, result, read)
        node.replace_all_uses_with(result)
        new.erase_node(node)
    return make_graph(new, tables.reads, graph.gives)


def insert_records(graph: Graph, sites: Sequence[str]) -> Graph:
    """`graph` that also copies rows of these marks, as they are before any patch.

    `<site>/rows` [S] int64 says which, `<site>/record` [S, ...] is written. The marks stay. Raises
    `UsageError` as `insert_patches` does.
    """
    new = copy_of(graph.module.graph)
    wanted = _by_site(graph, [Point(site) for site in sites])
    tables = _Tables(new, graph.reads)
    for node in [n for n in new.nodes if n.target is MARK and n.args[1] in wanted]:
        source, name = node.args[:2]
        with new.inserting_before(node):
            rows = new.call_function(
                aten.index_select.default, (source, 0, tables.read(f"{name}/rows"))
            )
            new.call_function(aten.copy_.default, (tables.read(f"{name}/record"), rows))
    return make_graph(new, tables.reads, graph.gives)


def make_tables(
    points: Sequence[Point],
    marks: Sequence[Mark],
    rows: int,
    *,
    sources: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:
    """Tables for `points` that patch nothing: indices -1, strengths 0, masks 1, sources 0.

    Indices of all points are views of one tensor, and so are strengths: "index" and "strength"
    [points, B], so that a plan's next call is two copies, not two a site. sources: rows of each
    source buffer, 0 for none.
    """
    shapes = {mark.name: mark for mark in marks}
    numbers = torch.float64 if dtype == torch.float64 else torch.float32
    tables = {
        "index": torch.full((len(points), rows), -1, dtype=torch.int64, device=device),
        "strength": torch.zeros(len(points), rows, dtype=numbers, device=device),
    }
    for i, point in enumerate(points):
        mark = shapes[point.site]
        tables[f"{point.site}/index"] = tables["index"][i]
        tables[f"{point.site}/strength"] = tables["strength"][i]
        if point.mask != "none":
            shape = mask_shape(mark, point.mask, rows)
            tables[f"{point.site}/mask"] = torch.ones(shape, dtype=numbers, device=device)
        if point.adds:
            tables[f"{point.site}/add_index"] = torch.zeros(rows, dtype=torch.int64, device=device)
            tables[f"{point.site}/add_scale"] = torch.zeros(rows, dtype=dtype, device=device)
        if point.source == "buffer":
            tables[f"{point.site}/source"] = torch.zeros(
                (sources, *mark.shape), dtype=dtype, device=device
            )
    return tables


def mask_shape(mark: Mark, kind: MaskKind, rows: int) -> tuple[int, ...]:
    """Shape of a mask of this kind. Raises `UsageError` where the site has no such axis.

    [B, N, C] sites: tokens [B, N], channels [B, 1, C]. [B, C, h, w] sites: channels [B, C], places
    [B, 1, h, w]. elements: all of it.
    """
    shape = mark.shape
    known: dict[str, tuple[int, ...]] = {"elements": shape}
    if len(shape) == 2:
        known |= {"tokens": shape[:1], "channels": (1, shape[1])}
    elif len(shape) == 3:
        known |= {"channels": shape[:1], "places": (1, *shape[1:])}
    if kind not in known:
        raise UsageError(
            f"{mark.name} has rows of shape {list(shape)} and no mask over {kind}; "
            f"expected {', '.join(known)}."
        )
    return (rows, *known[kind])


def _add(graph: fx.Graph, mark: fx.Node, own: fx.Node, read: Mapping[str, fx.Node]) -> fx.Node:
    """`own` and, scaled, a row of the buffer each: a scale of 0 adds zeros."""
    val = mark.meta["val"]
    with graph.inserting_before(mark):
        rows = graph.call_function(
            aten.index_select.default, (read["source"], 0, read["add_index"])
        )
        scale = graph.call_function(
            aten.view.default, (read["add_scale"], [-1] + [1] * (val.ndim - 1))
        )
        scaled = graph.call_function(aten.mul.Tensor, (rows, scale))
        result = graph.call_function(aten.add.Tensor, (own, scaled))
    for node in (rows, scaled, result):
        node.meta["val"] = val
    return result


class _Tables:
    """Placeholders added behind those a graph has."""

    def __init__(self, graph: fx.Graph, reads: tuple[str, ...]) -> None:
        self.graph, self.reads = graph, reads
        self.last = [node for node in graph.nodes if node.op == "placeholder"][-1]

    def read(self, name: str) -> fx.Node:
        with self.graph.inserting_after(self.last):
            self.last = self.graph.placeholder(f"table_{len(self.reads)}")
        self.reads = (*self.reads, name)
        return self.last


def _by_site(graph: Graph, points: Sequence[Point]) -> Mapping[str, Point]:
    found = {point.site: point for point in points}
    unknown = found.keys() - {mark.name for mark in graph.marks}
    if unknown:
        raise UsageError(f"The graph has no place called {sorted(unknown)[0]}.")
    if len(found) != len(points):
        raise UsageError("A place is patched twice; a mask puts several patches into one.")
    return found


def _alone(node: fx.Node, reader: fx.Node, order: Mapping[fx.Node, int]) -> bool:
    """Whether a write into node's tensor, at `reader`, can be seen through `reader` only.

    Others may have read it before, if they kept nothing of it; so has what it is a view of.
    """
    if node.op != "call_function":
        return False
    for user in node.users:
        late = order.get(user, -1) >= order[reader]
        if user is not reader and (late or aliased(user) is node):
            return False
    source = aliased(node)
    return source is None or _alone(source, node, order)


def aliased(node: fx.Node) -> fx.Node | None:
    """The input that node's tensor may share memory with."""
    first = node.all_input_nodes[0] if node.all_input_nodes else None
    if node.target is operator.getitem:
        return first
    op = node.target
    if not isinstance(op, torch._ops.OpOverload):
        return first
    if any(result.alias_info is not None for result in op._schema.returns):
        return first
    # reshape, contiguous, to: composite, of one tensor, and a view or not as memory has it.
    composite = op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return first if composite and len(node.all_input_nodes) == 1 else None
