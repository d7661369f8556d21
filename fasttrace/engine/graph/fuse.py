"""Put `patch_attention` where a graph calls torch's attention: keys are read where they lie.

torch's attention wants one key tensor a row, so a graph gathers each layer's keys and values out of
the text table first. The kernel is told each row's slot and reads the table itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, fx

import fasttrace_kernels  # noqa: F401  registers the op
from fasttrace.engine.graph.capture import Graph, copy_of, make_graph

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
LARGEST_HEAD = 256
_VIEWS = (aten.view.default, aten.reshape.default)
_GATHER = aten.index_select.default


class Gathered(NamedTuple):
    """Keys or values of the form table[slot] viewed as [B, n, H, D] and transposed."""

    table: fx.Node
    slot: fx.Node
    viewed: fx.Node
    transposed: fx.Node


def fuse_attention(graph: Graph) -> Graph:
    """`graph` with the fused op for every attention it can compute; see `fusable`.

    To be applied last, on an inference graph: keys that carry a patch or a mark are gathered as
    before, and the op has no gradient.
    """
    new = copy_of(graph.module.graph)
    for node in [n for n in new.nodes if n.target is ATTENTION]:
        if not fusable(node):
            continue
        query, key, value = node.args[:3]
        found = _gathered(key), _gathered(value)
        slot = None
        with new.inserting_before(node):
            if found[0] and found[1] and found[0].slot is found[1].slot:
                key, value = (_view(new, part) for part in found if part)
                slot = found[0].slot
            fused = new.call_function(
                torch.ops.fasttrace.patch_attention.default,
                (query, key, value, slot, None, None, _scale(node)),
            )
        fused.meta = dict(node.meta)
        node.replace_all_uses_with(fused)
        _erase(new, node)
    return make_graph(new, graph.reads, graph.gives)


def fusable(node: fx.Node) -> bool:
    """Whether the fused op computes this attention: no mask, no dropout, [B, H, N, D], D <= 256,
    as many query as key heads."""
    rest = dict(zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:], strict=False))
    rest |= {name: value for name, value in node.kwargs.items() if name != "scale"}
    if any(value not in (None, False, 0.0) for value in rest.values()):
        return False
    values = [n.meta["val"] for n in node.args[:3] if isinstance(n, fx.Node)]
    query, key, value = values
    return (
        all(v.dim() == 4 and v.stride(-1) == 1 for v in values)
        and query.shape[1] == key.shape[1] == value.shape[1]
        and query.shape[-1] == value.shape[-1] <= LARGEST_HEAD
    )


def _scale(node: fx.Node) -> float | None:
    scale = node.kwargs.get("scale")
    return float(scale) if isinstance(scale, int | float) else None


def _gathered(node: object) -> Gathered | None:
    if not isinstance(node, fx.Node) or node.target is not aten.transpose.int:
        return None
    view, *axes = node.args
    if axes != [1, 2] or not isinstance(view, fx.Node) or view.target not in _VIEWS:
        return None
    gather = view.args[0]
    if not isinstance(gather, fx.Node) or gather.target is not _GATHER:
        return None
    # Whatever else uses the rows may write into them, as a patch of keys does.
    if list(gather.users) != [view] or list(view.users) != [node]:
        return None
    table, axis, slot = gather.args
    shape = view.meta["val"].shape
    whole: Tensor = gather.meta["val"]
    if axis != 0 or len(shape) != 4 or shape[:2] != whole.shape[:2]:
        return None
    assert isinstance(table, fx.Node)
    assert isinstance(slot, fx.Node)
    return Gathered(table, slot, view, node)


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """The node and the views and gathers that only it read; what writes stays."""
    sources = node.all_input_nodes
    graph.erase_node(node)
    for source in sources:
        if not source.users and source.target in (*_VIEWS, aten.transpose.int, _GATHER):
            _erase(graph, source)


def _view(graph: fx.Graph, part: Gathered) -> fx.Node:
    size = part.viewed.meta["val"].shape[1:]
    heads = graph.call_function(aten.view.default, (part.table, [-1, *size]))
    rows = graph.call_function(aten.transpose.int, (heads, 1, 2))
    # Sizes of the gathered rows; the table has others on its first axis, which nothing asks for.
    heads.meta, rows.meta = dict(part.viewed.meta), dict(part.transposed.meta)
    return rows
