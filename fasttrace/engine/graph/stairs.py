"""One call in which lanes join at the site they are patched at: what comes before is shared.

At the call where its window opens a lane has the latent of the corrupt run, so up to its site it
*is* the corrupt run. Rows are added where they begin to differ, as copies of their parent's row of
every tensor that is still to be read.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

import fasttrace_kernels  # noqa: F401  registers the patch ops
from fasttrace.engine.graph.anyrows import AnyRows, Writer, grows
from fasttrace.engine.graph.capture import Graph
from fasttrace.engine.graph.marks import mark_of

aten = torch.ops.aten


def stairs(body: AnyRows, first: int, joins: Mapping[str, int]) -> Graph:
    """`body` (reading tables) begun with `first` rows; `joins[site]` rows are added at each site.

    Reads as the body does; "sample" has `first` rows, "slot:..." and "step_row" an entry for every
    row there is in the end. For each site also `<site>/parents` [joins] int64, the rows that the
    new ones copy, and `<site>/index`, `<site>/strength` [rows] as a patch op reads them, whose
    source are the site's own rows. New rows come behind those there are, in execution order.
    Raises `ModelError` where rows don't lie on a tensor's first axis.
    """
    nodes = list(body.small.module.graph.nodes)
    pairs = dict(body.pairs)
    order = {node: i for i, node in enumerate(nodes)}
    last = {node: max((order[user] for user in node.users), default=-1) for node in nodes}
    places = [node for node in nodes if node.op == "placeholder"]
    names = dict(zip(places, body.small.reads, strict=True))
    total = first + sum(joins.values())
    writer, reads = Writer(body), list(body.small.reads)
    tables: dict[str, fx.Node] = {}
    indices = set()
    for place in places:
        index = names[place].startswith("slot:") or names[place] == "step_row"
        writer.copy(place, total if index else first)
        if index:
            indices.add(place)
    for site in joins:
        for table in ("parents", "index", "strength"):
            reads.append(f"{site}/{table}")
            tables[reads[-1]] = writer.graph.placeholder(f"table_{len(reads)}")
    carried = [n for n in nodes if n.op == "call_function" or names.get(n) == "sample"]
    moving = {node for node in carried if grows((node, pairs[node]))}
    rows = first
    for node in nodes:
        mark = mark_of(node)
        if node.op == "placeholder":
            continue
        if mark is None:
            read = [source for source in node.all_input_nodes if source in indices]
            whole = {source: writer.copies[source] for source in read}
            for source in read:
                cut = (writer.copies[source], 0, 0, rows)
                writer.copies[source] = writer.call(aten.slice.Tensor, cut, source, rows)
            writer.copy(node, rows)
            writer.copies |= whole
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if mark.name in joins:
            parents, rows = tables[f"{mark.name}/parents"], rows + joins[mark.name]
            alive = [n for n in nodes[: order[node]] if n in moving and last[n] >= order[node]]
            for old in alive:
                taken = (writer.copies[old], 0, parents)
                new = writer.call(aten.index_select.default, taken, None, rows)
                both = ([writer.copies[old], new],)
                writer.copies[old] = writer.call(aten.cat.default, both, old, rows)
            cut_tables = [
                writer.call(aten.slice.Tensor, (tables[f"{mark.name}/{t}"], 0, 0, rows), None, 0)
                for t in ("index", "strength")
            ]
            own = writer.copies[source]
            patched = (own, own, *cut_tables, None)
            writer.copies[node] = writer.call(
                torch.ops.fasttrace.patch_rows.default, patched, node, rows
            )
        else:
            writer.copies[node] = writer.copies[source]
    return writer.finish(reads, body.small.gives)
