"""Marks: the places of a denoiser that can be patched, visible in its traced graph.

A mark is an identity op that carries a name. Temporary hooks put one on every site of the default
set and on tensors below module level; outside a trace nothing of it is left in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from fasttrace.adapters.hooks import tensor_of
from fasttrace.adapters.unet import site_modules

MarkKind = Literal["output", "heads", "key", "value", "hidden", "skip"]

_library = torch.library.Library("fasttrace", "FRAGMENT")
# A view, not the input itself: a trace knows tensors by identity, and what reads the unmarked one
# later (a skip's stream) must not seem to read the mark.
_library.define("mark(Tensor(a) tensor, str name, str kind, int heads) -> Tensor(a)")
_library.impl("mark", lambda tensor, *_: tensor.view_as(tensor), "CompositeExplicitAutograd")
MARK = torch.ops.fasttrace.mark.default


@dataclass(frozen=True)
class Mark:
    """A place in a traced graph. `shape` is that of one row, without the batch.

    output: a site of the default set, under its own name. heads: `<attention>.heads` [N, H D], the
    heads' outputs before the output projection, head h in channels h D to (h + 1) D. key, value:
    `<attention>.key` [n, H D], one row a text token. hidden: `<ff>.hidden` [N, C], the neurons.
    skip: `<up block>.skips.<i>`, what it takes over from the way down; the stream is not it.
    """

    name: str
    kind: MarkKind
    shape: tuple[int, ...]
    heads: int = 1  # of heads, key and value


def mark_of(node: fx.Node) -> Mark | None:
    """What a graph node marks, if it is a mark."""
    if node.target is not MARK:
        return None
    _, name, kind, heads = node.args
    shape = tuple(node.meta["val"].shape[1:])
    return Mark(name, kind, shape, heads)  # type: ignore[arg-type]


@contextmanager
def marking(denoiser: nn.Module) -> Iterator[None]:
    """Every place of the denoiser is marked as its forward passes. Its hooks end with the scope."""
    handles: list[Any] = []

    def outputs(module: nn.Module, name: str, kind: MarkKind, heads: int = 1) -> None:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            marked = MARK(tensor_of(output), name, kind, heads)
            return (marked, *output[1:]) if isinstance(output, tuple) else marked

        handles.append(module.register_forward_hook(hook))

    def first_input(module: nn.Module, name: str, heads: int) -> None:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> Any:
            return (MARK(args[0], name, "heads", heads), *args[1:])

        handles.append(module.register_forward_pre_hook(hook))

    def skips(module: nn.Module, name: str) -> None:
        handles.append(module.register_forward_pre_hook(_skip_hook(name), with_kwargs=True))

    try:
        for name, site in site_modules(denoiser).items():
            outputs(site, name, "output")
            if hasattr(site, "to_out") and hasattr(site, "heads"):
                heads = int(site.heads)  # type: ignore[arg-type]
                outputs(site.to_k, f"{name}.key", "key", heads)  # type: ignore[arg-type]
                outputs(site.to_v, f"{name}.value", "value", heads)  # type: ignore[arg-type]
                first_input(site.to_out[0], f"{name}.heads", heads)  # type: ignore[index,arg-type]
            elif name.endswith(".ff") and hasattr(site, "net"):
                outputs(site.net[0], f"{name}.hidden", "hidden")  # type: ignore[index,arg-type]
        for path, module in denoiser.named_modules():
            if path.rpartition(".")[0] == "up_blocks":
                skips(module, f"unet.{path}.skips")
        yield
    finally:
        for handle in handles:
            handle.remove()


def _skip_hook(name: str) -> Callable[[nn.Module, Any, dict[str, Any]], Any]:
    key = "res_hidden_states_tuple"

    def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        taken: tuple[Tensor, ...] | None = kwargs.get(key)
        if taken is None:
            return None
        marked = tuple(MARK(t, f"{name}.{i}", "skip", 1) for i, t in enumerate(taken))
        return args, {**kwargs, key: marked}

    return hook
