"""Plain forward hooks: see a module's output, or put another in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def tensor_of(output: Any) -> Tensor:
    """The tensor of a module's output: transformers' attention returns a tuple, others don't."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


@contextmanager
def watching(
    modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """`see(name, output)` after every forward of each module."""

    def replace(name: str, output: Tensor) -> None:
        see(name, output)

    with rewriting(modules, replace):
        yield


@contextmanager
def rewriting(
    modules: Mapping[str, nn.Module],
    new: Callable[[str, Tensor], Tensor | None],
    *,
    first: bool = False,
) -> Iterator[None]:
    """Outputs become `new(name, output)` wherever that is not None.

    The hooks run after all others, or before them with `first`: transformers collects hidden states
    with hooks of its own, which have to see what is written.
    """

    def hook_for(name: str) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            tensor = new(name, tensor_of(output))
            if tensor is None:
                return None
            return (tensor, *output[1:]) if isinstance(output, tuple) else tensor

        return hook

    handles = [m.register_forward_hook(hook_for(n), prepend=first) for n, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def rereading(
    modules: Mapping[str, nn.Module], new: Callable[[str, Tensor], Tensor | None]
) -> Iterator[None]:
    """The text a cross-attention module reads becomes `new(name, text)` where that is not None."""

    def hook_for(name: str) -> Callable[[nn.Module, Any, dict[str, Any]], Any]:
        def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            text = kwargs.get("encoder_hidden_states")
            other = None if text is None else new(name, text)
            if other is None:
                return None
            return args, {**kwargs, "encoder_hidden_states": other}

        return hook

    handles = [
        m.register_forward_pre_hook(hook_for(n), with_kwargs=True) for n, m in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def write_rows(
    out: Tensor,
    source: Tensor,
    *,
    rows: slice = slice(None),
    tokens: tuple[int, ...] | None = None,
    strength: float = 1.0,
) -> Tensor:
    """`out` [B, ...] with `source` [R, ...] written to its R `rows` (at `tokens` of axis 1 only).

    Strength 1 copies bit for bit, 0 returns `out` itself and never reads the source, between them
    lies the straight line. What is not written is copied bit for bit.
    """
    if strength == 0:
        return out
    new = out.clone()
    target = new[rows]
    value = source if strength == 1 else torch.lerp(target, source, strength)
    if tokens is None:
        target.copy_(value)
    else:
        index = list(tokens)
        target[:, index] = value[:, index]
    return new
