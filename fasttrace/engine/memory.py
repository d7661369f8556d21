"""How much memory a graph needs while it runs, from shapes alone, and how much there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from fasttrace.engine.graph.capture import Graph
from fasttrace.engine.graph.patches import aliased


def peak_bytes(graph: Graph) -> int:
    """The most that tensors made inside the graph take at one time.

    A tensor lives from its op to the last one that reads it or a view of it, as in the generated
    code. What an op takes for itself while it runs is not seen.
    """
    nodes = list(graph.module.graph.nodes)
    owner: dict[fx.Node, fx.Node | None] = {}  # whose memory it is; none of ours for an input
    last: dict[fx.Node, int] = {}
    for i, node in enumerate(nodes):
        source = aliased(node) if node.op == "call_function" else None
        owner[node] = node if source is None else owner[source]
        if node.op == "placeholder":
            owner[node] = None
        for read in node.all_input_nodes:
            if (own := owner[read]) is not None:
                last[own] = i
    ends: dict[int, list[fx.Node]] = {}
    for node, i in last.items():
        ends.setdefault(i, []).append(node)
    now = most = 0
    for i, node in enumerate(nodes):
        own = owner[node]
        if own is not None and own is node and own.op == "call_function":
            now += size_of(own.meta.get("val"))
            most = max(most, now)
        now -= sum(size_of(done.meta.get("val")) for done in ends.get(i, ()))
    return most


def available_bytes(device: torch.device) -> int | None:
    """What can still be allocated there; None where the system doesn't say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    found = []
    lines = _lines("/proc/meminfo")
    found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    # A container's own limit.
    most, used = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if most and used and most[0].isdecimal():
        found.append(int(most[0]) - int(used[0]))
    return min(found, default=None)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return []


def size_of(value: Any) -> int:
    """Bytes of a tensor, or of several."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, tuple | list):
        return sum(size_of(part) for part in value)
    return 0
