"""Which site each operator of a compiled graph belongs to, and what kind of operator it is.

An operator is a site's if two things hold. All that reads its result, directly or not, meets that
site's mark before any other site's (it feeds only that site). And it is of the site's module: it
reads one of the module's parameters, or follows from an operator that does, or reads only tables
(the keys and values gathered for a cross-attention, a ResNet's time embedding). A site whose module
has no parameters has all that feeds only it. Everything else is "other": residual sums between
sites, norms before attention, projections around a transformer, samplers, the first and the last
convolution.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fasttrace.engine.flops import count_node
from fasttrace.engine.graph.capture import Graph
from fasttrace.engine.graph.marks import MARK, mark_of
from fasttrace.errors import ModelError
from fasttrace.profile.traffic import bytes_of, is_view, row_bytes

aten = torch.ops.aten
OTHER = "other"
JOINS = "joining lanes"
_PATCHES = (torch.ops.fasttrace.patch_rows.default, torch.ops.fasttrace.patch_rows_.default)
_TABLES = ("text:", "step:", "slot:", "step_row")
_OPS = {
    "convolution": ("conv1d", "conv2d", "conv3d", "convolution"),
    "matrix product": ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm"),
    "attention": ("scaled_dot_product_attention", "patch_attention"),
    "norm": ("group_norm", "layer_norm", "native_group_norm", "native_layer_norm", "rms_norm"),
    "gather, cat": ("index_select", "cat", "embedding", "gather"),
    "layout": ("reshape", "contiguous", "clone", "permute", "transpose", "view", "copy_"),
}


@dataclass(frozen=True)
class Label:
    """What an interval of time was spent on. kind: a site's kind, or what else it was.

    flops, bytes: of one execution. point: of a patch in place, the step's point it writes at;
    `bytes` are then those of one patched row.
    """

    kind: str
    site: str = ""
    op: str = ""
    name: str = ""
    flops: int = 0
    bytes: int = 0
    point: int | None = None


def owners(body: Graph, kinds: Mapping[str, str]) -> dict[str, str]:
    """Node name -> site, of a body with marks; names of other nodes are absent.

    kinds: the sites to tell apart, each with its kind.
    """
    nodes = list(body.module.graph.nodes)
    names = dict(zip((n for n in nodes if n.op == "placeholder"), body.reads, strict=True))
    ahead: dict[fx.Node, frozenset[str | None]] = {}  # the marks met first; None is the output
    for node in reversed(nodes):
        met: set[str | None] = set()
        for user in node.users:
            mark = mark_of(user)
            if mark is not None and mark.kind == "output" and mark.name in kinds:
                met.add(mark.name)
            else:
                met |= {None} if user.op == "output" else ahead[user]
        ahead[node] = frozenset(met)
    owner_of = {name: _site_of_weight(name, kinds) for name in body.reads}
    weighty = set(owner_of.values())
    begun: dict[fx.Node, set[str]] = {}  # sites whose parameters it has to do with
    latent: dict[fx.Node, bool] = {}
    found = {}
    for node in nodes:
        sources = node.all_input_nodes
        if node.op == "placeholder":
            name = names[node]
            site = owner_of[name]
            begun[node] = set() if site is None else {site}
            latent[node] = name == "sample"
            continue
        begun[node] = set().union(*(begun[s] for s in sources)) & ahead[node]
        latent[node] = any(latent[s] for s in sources)
        if node.op != "call_function" or len(ahead[node]) != 1 or node.target is MARK:
            continue
        (site,) = ahead[node]
        if site is not None and (site in begun[node] or not latent[node] or site not in weighty):
            found[node.name] = site
    return found


def _site_of_weight(name: str, kinds: Mapping[str, str]) -> str | None:
    """The site whose module holds this parameter."""
    parts = f"unet.{name}".split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
    return next((prefix for prefix in prefixes if prefix in kinds), None)


def joined_owners(graph: Graph, body: Graph, owner: Mapping[str, str]) -> dict[str, str]:
    """`owner` for a graph in which lanes join, whose own nodes have other names.

    Without the nodes that join and patch rows it is the body, node by node. Raises `ModelError`
    where it isn't.
    """
    names = placeholder_names(graph)
    joining = _joining(graph, names)
    own = [
        n
        for n in graph.module.graph.nodes
        if n.op == "call_function" and n not in joining and n.target not in _PATCHES
    ]
    plain = [n for n in body.module.graph.nodes if n.op == "call_function" and n.target is not MARK]
    if [n.target for n in own] != [n.target for n in plain]:
        raise ModelError("A shared call's graph has other ops than the denoiser it is made from.")
    return {
        new.name: owner[old.name] for new, old in zip(own, plain, strict=True) if old.name in owner
    }


def labels_of(
    graph: Graph,
    owner: Mapping[str, str],
    kinds: Mapping[str, str],
    points: Sequence[str] = (),
) -> dict[fx.Node, Label]:
    """A label for each operator of `graph` that does something; views have none.

    What was put into the graph (patches, records, a fused attention) belongs to the site whose
    tables it reads, else to that of what reads it. points: the sites patched in place.
    """
    names = placeholder_names(graph)
    nodes = list(graph.module.graph.nodes)
    joining = _joining(graph, names)
    site_of: dict[fx.Node, str] = {}
    for node in reversed(nodes):
        own = owner.get(node.name) or _site_of_table(node, names)
        inserted = node.target is torch.ops.fasttrace.patch_attention.default
        if own is None and (inserted or _reads_table(node, names)):
            own = next((site_of[user] for user in node.users if user in site_of), None)
        if own in kinds:
            site_of[node] = str(own)
    found = {}
    for node in nodes:
        if node.op != "call_function" or is_view(node):
            continue
        site = "" if node in joining else site_of.get(node, "")
        kind = JOINS if node in joining else kinds.get(site, OTHER)
        label = Label(kind, site, op_of(node, names), node.name, count_node(node), bytes_of(node))
        if node.target is torch.ops.fasttrace.patch_rows_.default:
            point = points.index(site) if site in points else None
            label = Label(kind, site, label.op, node.name, 0, row_bytes(node), point)
        found[node] = label
    return found


def op_of(node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    """The kind of an operator: convolution, matrix product, attention, norm, patch, ..."""
    read = [names.get(source, "") for source in node.all_input_nodes]
    tables = {name.rpartition("/")[2] for name in read if "/" in name}
    if node.target in _PATCHES or tables & {"source", "index"}:
        return "patch"
    if tables & {"rows", "record"}:
        return "record"
    if tables & {"parents", "strength"}:
        return "gather, cat"
    schema = getattr(node.target, "_schema", None)
    name = "" if schema is None else schema.name.rpartition("::")[2]
    return next((op for op, known in _OPS.items() if name in known), "elementwise")


def placeholder_names(graph: Graph) -> dict[fx.Node, str]:
    places = (n for n in graph.module.graph.nodes if n.op == "placeholder")
    return dict(zip(places, graph.reads, strict=True))


def _joining(graph: Graph, names: Mapping[fx.Node, str]) -> set[fx.Node]:
    """Nodes that copy rows for lanes that join, and cut tables to the rows there are."""
    found: set[fx.Node] = set()
    for node in graph.module.graph.nodes:
        if node.op != "call_function":
            continue
        read = node.all_input_nodes
        cut = node.target is aten.slice.Tensor and names.get(read[0], "").rpartition("/")[2] in (
            "parents", "index", "strength",
        )  # fmt: skip
        cut = cut or (
            node.target is aten.slice.Tensor and names.get(read[0], "").startswith(_TABLES)
        )
        copied = node.target is aten.index_select.default and names.get(read[-1], "").endswith(
            "/parents"
        )
        both = node.target is aten.cat.default and read[-1] in found and _copies(read[-1])
        if cut or copied or both:
            found.add(node)
    return found


def _copies(node: fx.Node) -> bool:
    return node.target is aten.index_select.default


def _site_of_table(node: fx.Node, names: Mapping[fx.Node, str]) -> str | None:
    """The site whose patch or record tables a node reads, directly or cut to its rows."""
    for source in node.all_input_nodes:
        if source.target is aten.slice.Tensor and source.all_input_nodes:
            source = source.all_input_nodes[0]
        site, slash, _ = names.get(source, "").rpartition("/")
        if slash:
            return site
        if node.target is aten.copy_.default and source.op == "call_function":
            found = _site_of_table(source, names)
            if found is not None:
                return found
    return None


def _reads_table(node: fx.Node, names: Mapping[fx.Node, str]) -> bool:
    """Whether it has to do with tables of text alone: views of them that a fused kernel reads."""
    if node.target is operator.getitem or node.op != "call_function":
        return False
    return any(
        names.get(source, "").startswith("text:") or _reads_table(source, names)
        for source in node.all_input_nodes[:1]
    )
