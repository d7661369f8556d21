"""Where the ops meet torch's dispatcher.

Schemas, fake kernels and gradients are defined in Python; the compiled libraries only add kernels.
So the ops exist, and a traced graph runs, where nothing was compiled. The libraries are loaded when
the ops are registered, not at a first call: a graph calls `torch.ops.fasttrace.*` itself.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import _triton

NAMESPACE = "fasttrace"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


@dataclass(frozen=True)
class ExtensionStatus:
    """Whether the compiled ops are in use, and a sentence that says why."""

    loaded: bool
    sentence: str


def _find(name: str) -> Path | None:
    # An editable install keeps sources and compiled files in two folders of one package.
    import fasttrace_kernels

    folders = (Path(folder) for folder in fasttrace_kernels.__path__)
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _load(name: str) -> ExtensionStatus:
    if os.environ.get("FASTTRACE_NO_EXT", "0") not in ("", "0"):
        return ExtensionStatus(False, "switched off by the environment variable FASTTRACE_NO_EXT")
    path = _find(name)
    if path is None:
        return ExtensionStatus(
            False,
            "not built; plain PyTorch is used instead. To build them, install torch first, then "
            "this package with `pip install --no-build-isolation`, with a C++ compiler at hand",
        )
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        return ExtensionStatus(False, f"{path.name} can't be loaded beside this torch: {reason}")
    return ExtensionStatus(True, f"{path.name} is loaded")


@functools.cache
def extension_status() -> ExtensionStatus:
    """Loads the compiled CPU ops on the first call, and says whether that worked."""
    return _load("libfasttrace_ops.so")


@functools.cache
def cuda_extension_status() -> ExtensionStatus:
    """The same for the compiled CUDA ops, which are used only where triton is missing."""
    return _load("libfasttrace_ops_cuda.so")


def define(
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
) -> None:
    """Defines an op. `cpu` stands in for the compiled kernel, `cuda` launches the Triton kernel."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    extension_status()
    if not _has_kernel(name, "CPU"):
        _library.impl(name, cpu, "CPU")
    if _triton.available:
        _library.impl(name, cuda, "CUDA")
    else:
        cuda_extension_status()


def define_gradient(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]
) -> None:
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_library
    )


def refuse_gradient(name: str, remedy: str, *, mutates: int | tuple[int, ...]) -> None:
    """Makes an op that has no gradient say so, and counts its writes in arguments `mutates`."""
    written = (mutates,) if isinstance(mutates, int) else mutates
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default

    def autograd(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(
            isinstance(argument, torch.Tensor) and argument.requires_grad for argument in arguments
        ):
            raise RuntimeError(f"{name} has no gradient, but one is required; {remedy}")
        with torch._C._AutoDispatchBelowAutograd():
            result = overload(*arguments)
        for position in written:
            torch.autograd.graph.increment_version(arguments[position])
        return result

    _library.impl(name, autograd, "Autograd")


def _has_kernel(name: str, key: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key))
