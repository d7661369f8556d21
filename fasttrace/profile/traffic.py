"""Bytes that an operator reads and writes, from shapes; and what is alive while a graph runs."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from fasttrace.engine.graph.capture import Graph
from fasttrace.engine.graph.patches import aliased
from fasttrace.engine.memory import size_of

aten = torch.ops.aten
_GATHERS = (aten.index_select.default, aten.embedding.default)


def bytes_of(node: fx.Node) -> int:
    """Each tensor read once, the result written once; a gather reads the rows it takes.

    Caches are not known here: what an operator reads may not have left them. 0 for a view. A patch
    in place depends on how many rows it patches, see `row_bytes`.
    """
    if is_view(node) or node.target is torch.ops.fasttrace.patch_rows_.default:
        return 0
    value = node.meta.get("val")
    written = _stored(value)
    if node.target in _GATHERS:
        return 2 * written
    if node.target is aten.copy_.default:
        return 2 * _stored(_value(node.args[1]))
    if node.target is torch.ops.fasttrace.patch_attention.default:
        query, key, tables = (_value(argument) for argument in node.args[:3])
        rows = query.shape[0]
        each = sum(_stored(table) // max(1, table.shape[0]) for table in (key, tables))
        return _stored(query) + written + rows * each
    return written + sum(_stored(_value(source)) for source in node.all_input_nodes)


def row_bytes(node: fx.Node) -> int:
    """Of a patch in place: one row of the source read, one row written."""
    value = _value(node.args[0])
    return 2 * _stored(value) // max(1, value.shape[0]) if isinstance(value, Tensor) else 0


def is_view(node: fx.Node) -> bool:
    """Whether a node moves nothing: its result lies where its input does."""
    if node.op != "call_function" or node.target is operator.getitem:
        return node.op == "call_function"
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    schema = getattr(node.target, "_schema", None)
    if source is None or schema is None or schema.is_mutable:
        return False
    if any(result.alias_info is not None for result in schema.returns):
        return True
    before, after = _value(source), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    if node.target is aten.contiguous.default:
        return before.is_contiguous()
    if node.target is aten.reshape.default:
        return _viewable(before, tuple(after.shape))
    return False


def live_bytes(graph: Graph) -> list[int]:
    """Bytes of the graph's own tensors while each node runs, in the order of its nodes.

    A tensor lives from its op to the last one that reads it or a view of it.
    """
    nodes = list(graph.module.graph.nodes)
    owner: dict[fx.Node, fx.Node | None] = {}
    last: dict[fx.Node, int] = {}
    for i, node in enumerate(nodes):
        source = aliased(node) if node.op == "call_function" else None
        owner[node] = node if source is None else owner[source]
        if node.op != "call_function":
            owner[node] = None
        for read in node.all_input_nodes:
            if (own := owner[read]) is not None:
                last[own] = i
    ends: dict[int, list[fx.Node]] = {}
    for node, i in last.items():
        ends.setdefault(i, []).append(node)
    now, found = 0, []
    for i, node in enumerate(nodes):
        if owner[node] is node and node in last:
            now += size_of(node.meta.get("val"))
        found.append(now)
        now -= sum(size_of(done.meta.get("val")) for done in ends.get(i, ()))
    return found


def _viewable(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    try:
        tensor.view(shape)
    except RuntimeError:
        return False
    return True


def _value(argument: Any) -> Any:
    return argument.meta.get("val") if isinstance(argument, fx.Node) else argument


def _stored(value: Any) -> int:
    """Bytes of a tensor, or of several; what is repeated by a stride of 0 counts once."""
    if isinstance(value, Tensor):
        taken = value.element_size()
        for size, stride in zip(value.shape, value.stride(), strict=True):
            taken *= size if stride else 1
        return taken if value.numel() else 0
    if isinstance(value, tuple | list):
        return sum(map(_stored, value))
    return 0
