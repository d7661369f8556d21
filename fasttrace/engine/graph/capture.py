"""Trace a denoiser into an fx graph, once per batch shape.

`make_fx(pre_dispatch=True)` rather than `torch.export`, because it takes any callable (marks,
lifted parameters and keyword inputs need no wrapper module) and adds no guards to carry along. Both
keep attention, `linear` and `group_norm` whole. Tracing runs on fake tensors: no weight is read and
nothing is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fasttrace.engine.graph.marks import Mark, mark_of, marking
from fasttrace.errors import ModelError

Inputs = Mapping[str, Any]  # a denoiser's keyword arguments, nested where it nests them


@dataclass(frozen=True)
class Graph:
    """A traced function from named tensors to named tensors.

    `reads` names the placeholders, `gives` the outputs, both in order. Parameters and buffers are
    read under their own names: they are arguments, not copies, so an edit in place shows at once.
    """

    module: fx.GraphModule
    reads: tuple[str, ...]
    gives: tuple[str, ...]

    def __call__(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = self.module(*(values[name] for name in self.reads))
        return dict(zip(self.gives, found, strict=True))

    @property
    def marks(self) -> tuple[Mark, ...]:
        """In execution order."""
        found = (mark_of(node) for node in self.module.graph.nodes)
        return tuple(mark for mark in found if mark is not None)

    @property
    def size(self) -> int:
        """How many ops run."""
        return sum(node.op == "call_function" for node in self.module.graph.nodes)


def capture(
    denoiser: nn.Module,
    inputs: Inputs,
    device: torch.device | None = None,
    channels: int | None = None,
) -> Graph:
    """The denoiser's prediction, given under "prediction", as a graph with marks.

    inputs: its keyword arguments; a tensor in a dictionary inside is read as "outer.inner". Only
    their shapes and dtypes matter; timestep has to be [B], so that the graph's step-only part works
    on rows. device: trace as if everything were there (a denoiser on meta). channels: the first
    ones of the prediction, where its others (a variance) are not read.

    Raises `ModelError` where the forward pass holds tensors that are neither parameters nor
    buffers, calls a site twice, or depends on a tensor's value.
    """
    _check_slicing(denoiser)
    weights = tensors_of(denoiser)
    given = flatten(inputs)
    reads = (*weights, *given)
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def forward(*flat: Tensor) -> tuple[Tensor]:
        values = dict(zip(reads, flat, strict=True))
        arguments = _unflatten(inputs, values)
        own = {name: values[name] for name in weights}
        output = torch.func.functional_call(denoiser, own, (), arguments)
        prediction = output[0] if isinstance(output, tuple) else output.sample
        return (prediction if channels is None else prediction[:, :channels],)

    try:
        with torch.no_grad(), mode, marking(denoiser):
            fakes = [
                torch.empty_strided(
                    t.shape,
                    t.stride(),
                    dtype=t.dtype,
                    device=t.device if device is None else device,
                )
                for t in (*weights.values(), *given.values())
            ]
            module = make_fx(forward, pre_dispatch=True)(*fakes)
    except torch._subclasses.fake_tensor.DataDependentOutputException as error:
        raise ModelError(
            f"The denoiser's forward pass depends on a tensor's value: {error}"
        ) from error
    _check(module.graph)
    return make_graph(module.graph, reads, ("prediction",))


def _check_slicing(denoiser: nn.Module) -> None:
    sliced = [
        name
        for name, module in denoiser.named_modules()
        if getattr(getattr(module, "processor", None), "slice_size", None) is not None
    ]
    if sliced:
        raise ModelError(
            f"Attention slicing is on in {len(sliced)} modules (first: {sliced[0]}), which does "
            "one thing after another for every row; call pipe.disable_attention_slicing(), or use "
            "the reference engine."
        )


def tensors_of(denoiser: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name: what a captured graph reads beside its inputs."""
    return dict([*denoiser.named_parameters(), *denoiser.named_buffers()])


def flatten(inputs: Inputs) -> dict[str, Tensor]:
    """Tensors among a denoiser's keyword arguments, under the names a graph reads."""
    found: dict[str, Tensor] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, Mapping):
            found |= {f"{name}.{inner}": tensor for inner, tensor in flatten(value).items()}
    return found


def make_graph(graph: fx.Graph, reads: tuple[str, ...], gives: tuple[str, ...]) -> Graph:
    """`graph`, whose placeholders are `reads` in order, checked and made callable."""
    # make_fx flattens its arguments again at every call unless the plain code generator is set.
    graph.set_codegen(fx.graph.CodeGen())
    graph.lint()
    return Graph(fx.GraphModule(nn.Module(), graph), reads, gives)


def copy_of(graph: fx.Graph) -> fx.Graph:
    """A copy to rewrite, with what each node is known to give."""
    new = fx.Graph()
    new.output(new.graph_copy(graph, {}))
    return new


def _unflatten(inputs: Inputs, values: Mapping[str, Tensor], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            found[name] = values[prefix + name]
        elif isinstance(value, Mapping):
            found[name] = _unflatten(value, values, f"{prefix}{name}.")
        else:
            found[name] = value
    return found


def _check(graph: fx.Graph) -> None:
    names = []
    for node in graph.nodes:
        if node.op == "get_attr":
            raise ModelError(
                f"The denoiser holds a tensor ({node.target}) that is neither a parameter nor a "
                "buffer, so a change of it would go unseen; use the reference engine."
            )
        if (mark := mark_of(node)) is not None:
            names.append(mark.name)
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ModelError(f"{sorted(twice)[0]} is called more than once in a forward pass.")
