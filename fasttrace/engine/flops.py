"""Floating-point operations of a traced graph, from shapes alone. A multiply-add counts as two.

Matrix products, convolutions and attention are counted, elementwise work is not. torch's own
counter sees nothing of attention on the CPU, whose kernel it has no formula for.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

import fasttrace_kernels  # noqa: F401  registers patch_attention
from fasttrace.engine.graph.capture import Graph

aten = torch.ops.aten
Formula = Callable[..., int]


def count(graph: Graph) -> int:
    """FLOPs of one call of `graph`, for all of its rows."""
    return sum(count_node(node) for node in graph.module.graph.nodes)


def count_node(node: fx.Node) -> int:
    """FLOPs of one op; 0 for what isn't a product, a convolution or attention."""
    formula = _FORMULAS.get(node.target) if node.op == "call_function" else None
    if formula is None:
        return 0
    return formula(node.meta["val"], *map(_value, node.args))


def _value(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


def _linear(out: Tensor, x: Tensor, *_: Any) -> int:
    return 2 * out.numel() * x.shape[-1]


def _convolution(out: Tensor, _x: Tensor, weight: Tensor, *_: Any) -> int:
    return 2 * out.numel() * prod(weight.shape[1:])  # [out, in / groups, kernel ...]


def _attention(out: Tensor, query: Tensor, key: Tensor, *_: Any) -> int:
    pairs = query.shape[:-1].numel() * key.shape[-2]
    return 2 * pairs * (query.shape[-1] + out.shape[-1])  # with the keys, then with the values


def _product(out: Tensor, left: Tensor, *_: Any) -> int:
    return 2 * out.numel() * left.shape[-1]


def _added_product(out: Tensor, _added: Tensor, left: Tensor, *_: Any) -> int:
    return _product(out, left)


_FORMULAS: dict[Any, Formula] = {
    aten.linear.default: _linear,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.scaled_dot_product_attention.default: _attention,
    torch.ops.fasttrace.patch_attention.default: _attention,
    aten.matmul.default: _product,
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.addmm.default: _added_product,
    aten.baddbmm.default: _added_product,
}
