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
    code. Of what an op takes for itself while it runs, only convolutions' on a CPU is counted.
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
            most = max(most, now + _scratch(node))
        now -= sum(size_of(done.meta.get("val")) for done in ends.get(i, ()))
    return most


def _scratch(node: fx.Node) -> int:
    """What oneDNN copies into its own layout, as measured: a convolution's input and weights, and
    its output as well where the kernel is a single pixel; an enlarged picture.
    """
    value = node.meta["val"]
    if not isinstance(value, Tensor) or value.device.type != "cpu":
        return 0
    name = str(node.target)
    if name.startswith(("aten.conv2d", "aten.convolution")):
        read, weight = (n.meta["val"] for n in node.all_input_nodes[:2])
        return size_of(read) + size_of(weight) + (size_of(value) if weight.shape[-1] == 1 else 0)
    return size_of(value) if name.startswith("aten.upsample") else 0


def device_of(graph: Graph) -> torch.device:
    """Where it runs, by what it was traced on."""
    (output,) = (node for node in graph.module.graph.nodes if node.op == "output")
    device: torch.device = output.args[0][0].meta["val"].device
    return device


def resident_bytes(active: int, kept: int, device: torch.device) -> int:
    """What is in use at most: `active` bytes at a graph's peak, `kept` ones, libraries' buffers.

    glibc's allocator grows a process by more, since it keeps freed blocks that nothing fits into:
    1.3 to 2.4 times as much was measured, from run to run, unless MALLOC_MMAP_THRESHOLD_ is set.
    """
    return active + kept + (LIBRARIES if device.type == "cpu" else 0)


LIBRARIES = 16 << 20  # measured: oneDNN's and MKL's own


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
