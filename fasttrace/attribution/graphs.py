"""The denoiser's graph with its marked tensors among what it returns, to take gradients at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fasttrace.engine.graph.capture import Graph, copy_of, make_graph
from fasttrace.engine.graph.marks import MARK
from fasttrace.errors import ModelError

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Returns:
    """A graph that gives "prediction" and, by name, marks as what follows reads them.

    patched marks also give "<mark>/before" (as it was), and read "<mark>/index", "/strength" and
    "/source". attentions: sites that also give "<site>/query", "/keys", "/values" and "/attended"
    [B, H, ., D], as they meet in the attention op; scales: its factor of the logits, None for
    1 / sqrt(D).
    """

    graph: Graph
    scales: dict[str, float | None]


def returning(
    graph: Graph,
    marks: Sequence[str],
    patched: Sequence[str] = (),
    attentions: Sequence[str] = (),
) -> Returns:
    """`graph`, differentiable in its inputs and in what it returns.

    Raises `ModelError` where a site's keys meet no attention op.
    """
    new = copy_of(graph.module.graph)
    scales: dict[str, float | None] = {}
    found: dict[str, fx.Node] = {}
    nodes = {node.args[1]: node for node in new.nodes if node.target is MARK}
    for site in attentions:
        attention = _attention(nodes.get(f"{site}.key"))
        if attention is None:
            raise ModelError(f"The keys of {site} meet no attention op, so there is no softmax.")
        scales[site] = attention.kwargs.get("scale")  # type: ignore[assignment]
        parts = (*attention.args[:3], attention)
        names = ("query", "keys", "values", "attended")
        found |= {f"{site}/{name}": part for name, part in zip(names, parts, strict=True)}  # type: ignore[misc]
    reads = list(graph.reads)
    last = [node for node in new.nodes if node.op == "placeholder"][-1]
    for name, node in nodes.items():
        result = node.args[0]
        if name in patched:
            tables = []
            for table in ("source", "index", "strength"):
                with new.inserting_after(last):
                    last = new.placeholder(f"table_{len(reads)}")
                reads.append(f"{name}/{table}")
                tables.append(last)
            with new.inserting_before(node):
                found[f"{name}/before"] = new.call_function(aten.alias.default, (result,))
                result = new.call_function(
                    torch.ops.fasttrace.patch_rows.default, (found[f"{name}/before"], *tables, None)
                )
        if name in marks or name in patched:
            # Another view: what reads the unmarked tensor (a skip's stream) has no part in it.
            with new.inserting_before(node):
                result = new.call_function(aten.alias.default, (result,))
            found[name] = result
        node.replace_all_uses_with(result)
        for key, given in found.items():
            if given is node:
                found[key] = result
        new.erase_node(node)
    output = next(node for node in new.nodes if node.op == "output")
    before = output.args[0]
    assert isinstance(before, tuple | list)
    output.args = ((*before, *found.values()),)
    return Returns(make_graph(new, tuple(reads), (*graph.gives, *found)), scales)


def _attention(node: fx.Node | None) -> fx.Node | None:
    """The attention op whose keys come from this node."""
    waiting = [] if node is None else [node]
    while waiting:
        node = waiting.pop(0)
        if node.target is SDPA:
            return node
        waiting += node.users
    return None
