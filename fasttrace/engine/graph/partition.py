"""Split a traced denoiser by what its nodes depend on, so that each runs as seldom as it may.

Text-only nodes (keys and values of cross-attention) run once a prompt, step-only nodes (the time
embedding and its projections) once a schedule, the rest once a call. Every part keeps the row count
it was traced with: its rows are filled with other texts, or other calls, than the body's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from enum import IntFlag

import torch
from torch import Tensor, fx

from fasttrace.engine.graph.capture import Graph, copy_of, make_graph
from fasttrace.engine.graph.marks import MARK

aten = torch.ops.aten


class Needs(IntFlag):
    """What a node depends on besides parameters and constants."""

    NOTHING = 0
    TEXT = 1
    STEP = 2
    LATENT = 4


_INPUTS = {
    "encoder_hidden_states": Needs.TEXT,
    "added_cond_kwargs": Needs.TEXT,
    "timestep": Needs.STEP,
    "timestep_cond": Needs.STEP,  # of the guidance: the same in all of a run
}


@dataclass(frozen=True)
class Parts:
    """The denoiser as three graphs: `body` reads what `text` and `step` give.

    text: reads parameters and text inputs, gives "text:..." [B, ...], a row a text. step: reads
    parameters, timesteps (and "text:..." where pooled text enters, so that a row is a call with a
    text), gives "step:..." [B, ...]. removed: exact no-ops taken out, by op. keys: the mark that a
    "text:..." value meets in the body (a cross-attention's key or value).
    """

    text: Graph
    step: Graph
    body: Graph
    removed: Mapping[str, int]
    keys: Mapping[str, str]

    @property
    def step_reads_text(self) -> bool:
        return any(name.startswith("text:") for name in self.step.reads)


def partition(graph: Graph, parameters: Collection[str]) -> Parts:
    """Split a captured graph. `parameters`: which of the names it reads are weights.

    Inputs of unknown names stay with the latents, as do marked tensors and all that follows them,
    since a patch may write there.
    """
    graph, removed = remove_no_ops(graph)
    nodes = list(graph.module.graph.nodes)
    places = [node for node in nodes if node.op == "placeholder"]
    names = dict(zip(places, graph.reads, strict=True))
    rows = places[graph.reads.index("sample")].meta["val"].shape[0]
    needs = _needs(nodes, names, set(parameters), rows)
    part = {node: _part(need) for node, need in needs.items()}
    split = _Split(nodes, names, part)
    text, step, body = (split.build(name, graph.gives) for name in ("text", "step", "body"))
    keys = {}
    for node in nodes:
        marks = [user.args[1] for user in node.users if user.target is MARK]
        if part.get(node) == "text" and marks:
            keys[f"text:{node.name}"] = str(marks[0])
    return Parts(text, step, body, removed, keys)


def remove_no_ops(graph: Graph) -> tuple[Graph, dict[str, int]]:
    """The graph without ops that give their input back bit for bit, and how many of each went."""
    new = copy_of(graph.module.graph)
    removed: Counter[str] = Counter()
    for node in new.nodes:
        if node.op == "call_function" and _gives_its_input(node):
            node.replace_all_uses_with(node.args[0])
            new.erase_node(node)
            removed[str(node.target)] += 1
    return replace(graph, module=make_graph(new, graph.reads, graph.gives).module), dict(removed)


def with_tables(parts: Parts) -> Graph:
    """The body reading tables: what it read as [B, ...] it gathers from [rows, ...] by itself.

    "text:..." becomes a table over text slots, gathered by "slot:<site>" [B] int64, one for a
    layer's keys and values, so that it may read another prompt ("slot:text:..." for what is
    neither); "step:..." a table over calls (times text slots), gathered by "step_row" [B] int64.
    Each is gathered just before its first use.
    """
    new = copy_of(parts.body.module.graph)
    reads = list(parts.body.reads)
    places = [node for node in new.nodes if node.op == "placeholder"]
    order = {node: i for i, node in enumerate(new.nodes)}
    indices: dict[str, fx.Node] = {}
    for name, place in zip(parts.body.reads, places, strict=True):
        if not name.startswith(("text:", "step:")):
            continue
        layer = parts.keys.get(name, "").rpartition(".")[0] or name
        key = f"slot:{layer}" if name.startswith("text:") else "step_row"
        if key not in indices:
            with new.inserting_after(next(reversed(indices.values()), places[-1])):
                indices[key] = new.placeholder(f"index_{len(indices)}")
            reads.append(key)
        users = list(place.users)
        with new.inserting_before(min(users, key=order.__getitem__)):
            gathered = new.call_function(aten.index_select.default, (place, 0, indices[key]))
        gathered.meta["val"] = place.meta["val"]
        for user in users:
            user.replace_input_with(place, gathered)
    return make_graph(new, tuple(reads), parts.body.gives)


def _needs(
    nodes: list[fx.Node], names: Mapping[fx.Node, str], parameters: set[str], rows: int
) -> dict[fx.Node, Needs]:
    needs: dict[fx.Node, Needs] = {}
    for node in nodes:
        if node.op == "placeholder":
            name = names[node]
            known = _INPUTS.get(name.partition(".")[0], Needs.LATENT)
            needs[node] = Needs.NOTHING if name in parameters else known
        elif node.op == "call_function":
            needs[node] = Needs.NOTHING
            for source in node.all_input_nodes:
                needs[node] |= needs[source]
            if node.target is MARK:
                needs[node] |= Needs.LATENT
    # What crosses into another part becomes a table over rows, so its first axis has to be that of
    # the rows; where it isn't, the op stays in the body and its inputs cross instead.
    for node in reversed(nodes):
        if node.op != "call_function" or _part(needs[node]) not in ("text", "step"):
            continue
        crosses = any(_part(needs.get(u, Needs.LATENT)) != _part(needs[node]) for u in node.users)
        value = node.meta.get("val")
        if crosses and not (
            isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows
        ):
            needs[node] = Needs.LATENT
    return needs


def _part(needs: Needs) -> str:
    if needs & Needs.LATENT:
        return "body"
    if needs & Needs.STEP:
        return "step"
    return "text" if needs & Needs.TEXT else "any"


class _Split:
    def __init__(
        self, nodes: list[fx.Node], names: Mapping[fx.Node, str], part: Mapping[fx.Node, str]
    ) -> None:
        self.nodes, self.names, self.part = nodes, names, part

    def build(self, name: str, predictions: tuple[str, ...]) -> Graph:
        """One part: its own nodes, with constants copied in and other parts' values read."""
        if name == "body":
            output = self.nodes[-1].args[0]
            assert isinstance(output, tuple | list)
            results = dict(zip(predictions, output, strict=True))
        else:
            results = {f"{name}:{n.name}": n for n in self.nodes if self._leaves(n, name)}
        mine = self._reach(set(results.values()), name)
        graph, copies, reads = fx.Graph(), {}, []
        for node in self.nodes:
            if node in mine and (node.op == "placeholder" or not self._inside(node, name)):
                place = graph.placeholder(node.name)
                place.meta = dict(node.meta)
                copies[node] = place
                known = self.names.get(node)
                reads.append(known if known is not None else f"{self.part[node]}:{node.name}")
        for node in self.nodes:
            if node in mine and node not in copies:
                copies[node] = graph.node_copy(node, lambda n: copies[n])
        graph.output(tuple(copies[node] for node in results.values()))
        return make_graph(graph, tuple(reads), tuple(results))

    def _inside(self, node: fx.Node, name: str) -> bool:
        return self.part[node] in (name, "any")

    def _leaves(self, node: fx.Node, name: str) -> bool:
        """Whether a value of this part is read by another, or by none (the output's users)."""
        return (
            node.op == "call_function"
            and self.part[node] == name
            and any(self.part.get(user, "body") != name for user in node.users)
        )

    def _reach(self, results: set[fx.Node], name: str) -> set[fx.Node]:
        seen: set[fx.Node] = set()
        waiting = list(results)
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            if node.op == "call_function" and self._inside(node, name):
                waiting.extend(node.all_input_nodes)
        return seen


def _gives_its_input(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    if node.target is MARK or not isinstance(source, fx.Node):
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    if (before.shape, before.dtype, before.device) != (after.shape, after.dtype, after.device):
        return False
    rest = node.args[1:]
    if node.target in (aten.div.Tensor, aten.mul.Tensor):
        factor = rest[0]
        return before.is_floating_point() and isinstance(factor, float | int) and factor == 1
    if node.target is aten.dropout.default:
        return bool(rest[0] == 0) or rest[1] is False
    if node.target is aten.to.dtype:
        return len(rest) == 1 and not node.kwargs
    # A view of the same shape and strides: expand to the same size, a slice of everything.
    same: bool = before.stride() == after.stride()
    return same and _is_view(node)


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.is_mutable or len(schema.returns) != 1:
        return False
    # Conjugate and negative views look alike in every size.
    return schema.returns[0].alias_info is not None and node.target not in (
        aten._conj.default,
        aten._neg_view.default,
    )
