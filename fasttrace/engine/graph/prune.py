"""What a site replaced wholesale makes superfluous, and what comes after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import fx

from fasttrace.engine.flops import count_node
from fasttrace.engine.graph.anyrows import LARGE, SMALL, AnyRows
from fasttrace.engine.graph.capture import Graph, copy_of, make_graph
from fasttrace.engine.graph.marks import MARK, mark_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """FLOPs of one row of one call.

    whole: the body. apart: what of it depends on the text (the rest is common to rows with one
    latent). dead: of each marked place, what only fed it. after: what follows from it.
    """

    whole: int
    apart: int
    dead: dict[str, int]
    after: dict[str, int]


def cost_of(body: AnyRows) -> Cost:
    """Measured on a body that reads tables, from shapes alone."""
    nodes = list(body.small.module.graph.nodes)
    flops = {
        small: (count_node(large) - count_node(small)) // (LARGE - SMALL)
        for small, large in body.pairs
    }
    places = [node for node in nodes if node.op == "placeholder"]
    names = dict(zip(places, body.small.reads, strict=True))
    texts = [place for place in places if names[place].startswith("slot:")]
    if not texts:  # nothing to gather: no cross-attention
        texts = [place for place in places if names[place].startswith("text:")]
    output = nodes[-1]
    living = _needed([output])
    dead, after = {}, {}
    for node in nodes:
        if (mark := mark_of(node)) is not None:
            needed = _needed([output], node)
            dead[mark.name] = sum(flops[n] for n in living - needed)
            after[mark.name] = sum(flops[n] for n in _readers([node]))
    whole = sum(flops[n] for n in living)
    return Cost(whole, sum(flops[n] for n in _readers(texts)), dead, after)


def prune(graph: Graph, site: str) -> Graph:
    """A body in which `site` is read from `<site>/source` at `<site>/index` [B], and nothing that
    only fed it is computed any more. It has no marks."""
    new = copy_of(graph.module.graph)
    nodes = list(new.nodes)
    places = [node for node in nodes if node.op == "placeholder"]
    names = dict(zip(places, graph.reads, strict=True))
    with new.inserting_after(places[-1]):
        index = new.placeholder("site_index")
        source = new.placeholder("site_source")
    names |= {source: f"{site}/source", index: f"{site}/index"}
    for node in [n for n in nodes if n.target is MARK]:
        result = node.args[0]
        if node.args[1] == site:
            with new.inserting_before(node):
                result = new.call_function(aten.index_select.default, (source, 0, index))
            result.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(result)
        new.erase_node(node)
    for node in reversed(list(new.nodes)):
        if node.op != "output" and not node.users:
            new.erase_node(node)
    reads = tuple(names[node] for node in new.nodes if node.op == "placeholder")
    return replace(graph, module=make_graph(new, reads, graph.gives).module, reads=reads)


def _needed(ends: Iterable[fx.Node], given: fx.Node | None = None) -> set[fx.Node]:
    """All that `ends` need when `given` is there already."""
    return _reached(ends, lambda node: () if node is given else node.all_input_nodes)


def _readers(starts: Iterable[fx.Node]) -> set[fx.Node]:
    """All that reads one of `starts`, they included."""
    return _reached(starts, lambda node: node.users)


def _reached(
    starts: Iterable[fx.Node], onward: Callable[[fx.Node], Iterable[fx.Node]]
) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    waiting = list(starts)
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting.extend(onward(node))
    return seen
