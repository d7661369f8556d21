"""A scope: whatever happens inside, the pipeline and the process leave it as they entered."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from fasttrace.errors import ModelError

# Run as they are; hooks go into all others, and don't reach inside compiled code.
_DECODERS = ("vae", "movq")
# Exact types only: diffusers' configurations are dict subclasses that refuse to be cleared.
_COPIED = (dict, OrderedDict, list, set)


def pipeline_modules(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's neural networks by component name."""
    parts = getattr(pipe, "components", {})
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


@contextmanager
def scope(pipe: Any, *, keep_weights: bool = False) -> Iterator[None]:
    """Everything of `pipe` in evaluation mode, gradients off; all of it undone at the end.

    Parts compiled with torch.compile, but for the decoder, run as the plain modules they wrap.

    Restores parameters, buffers, hooks, attention processors, training mode and any other attribute
    of every module, the scheduler's state, the global random generators and torch's flags, also
    when an error passes through. Tensors edited in place inside are restored only with
    `keep_weights=True` (which copies them); otherwise such an edit raises `ModelError` at the end.
    """
    undo: list[Callable[[], None]] = [_random_state(), _torch_flags(), _plain_attributes(pipe)]
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is not None:
        undo.append(_scheduler_state(scheduler))
    modules = pipeline_modules(pipe)
    undo.extend(_module_state(m) for part in modules.values() for m in part.modules())
    tensors = [
        t
        for part in modules.values()
        for t in (*part.parameters(), *part.buffers())
        if not t.is_meta
    ]
    learning = [t.requires_grad for t in tensors]
    versions = [None if t.is_inference() else t._version for t in tensors]
    copies = [t.detach().clone() for t in tensors] if keep_weights else None
    try:
        for part in modules.values():
            part.eval()
        torch.set_grad_enabled(False)
        for name, part in modules.items():
            if name not in _DECODERS:
                _uncompile(pipe, name, part)
        yield
    finally:
        for step in reversed(undo):
            step()
        for tensor, wanted in zip(tensors, learning, strict=True):
            if tensor.requires_grad != wanted:
                tensor.requires_grad_(wanted)
        edited = [
            i
            for i, (t, v) in enumerate(zip(tensors, versions, strict=True))
            if v is not None and t._version != v
        ]
        if copies is not None:
            with torch.no_grad():
                for i in edited:
                    tensors[i].copy_(copies[i])
    if edited and copies is None:
        raise ModelError(
            f"{len(edited)} weights were edited in place inside a scope that keeps no copies; "
            "use scope(pipe, keep_weights=True) around code that edits weights."
        )


def _uncompile(pipe: Any, name: str, part: nn.Module) -> None:
    plain = getattr(part, "_orig_mod", None)
    if isinstance(plain, nn.Module):
        pipe.__dict__[name] = plain  # a pipeline's own setter rewrites its configuration
    for module in part.modules():
        if module._compiled_call_impl is not None:
            module._compiled_call_impl = None


def _attributes(holder: dict[str, Any]) -> Callable[[], None]:
    """Undo for one object's attributes and for the plain containers among them."""
    saved = holder.copy()
    inner = [(v, v.copy() if v else None) for v in saved.values() if type(v) in _COPIED]

    def undo() -> None:
        for container, contents in inner:
            if contents is None:
                if container:
                    container.clear()
                continue
            container.clear()
            container.extend(contents) if type(container) is list else container.update(contents)
        if holder.keys() != saved.keys() or any(holder[k] is not v for k, v in saved.items()):
            holder.clear()
            holder.update(saved)

    return undo


def _module_state(module: nn.Module) -> Callable[[], None]:
    return _attributes(module.__dict__)


def _plain_attributes(pipe: Any) -> Callable[[], None]:
    return _attributes(pipe.__dict__)


def _scheduler_state(scheduler: Any) -> Callable[[], None]:
    saved, contents = dict(scheduler.__dict__), copy.deepcopy(scheduler.__dict__)

    def undo() -> None:
        scheduler.__dict__.clear()
        # Immutable values keep their identity; the others come back as they were.
        immutable = (int, float, str, bool, type(None), tuple)
        for key, value in saved.items():
            scheduler.__dict__[key] = value if isinstance(value, immutable) else contents[key]

    return undo


def _random_state() -> Callable[[], None]:
    cuda: Any = torch.cuda
    legacy: Any = np.random  # diffusers and user code may draw from the global generator
    states = random.getstate(), legacy.get_state(), torch.get_rng_state()
    on_gpu = cuda.get_rng_state_all() if cuda.is_initialized() else None

    def undo() -> None:
        random.setstate(states[0])
        legacy.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_gpu is not None:
            cuda.set_rng_state_all(on_gpu)

    return undo


def _torch_flags() -> Callable[[], None]:
    grad, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    strict = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    homes = [
        (torch.backends.cudnn, ("enabled", "benchmark", "deterministic", "allow_tf32")),
        (torch.backends.cuda.matmul, ("allow_tf32",)),
    ]
    flags = [(home, name, getattr(home, name)) for home, names in homes for name in names]
    cuda: Any = torch.backends.cuda
    sdp: list[tuple[Callable[[bool], None], bool]] = [
        (cuda.enable_flash_sdp, cuda.flash_sdp_enabled()),
        (cuda.enable_mem_efficient_sdp, cuda.mem_efficient_sdp_enabled()),
        (cuda.enable_math_sdp, cuda.math_sdp_enabled()),
        (cuda.enable_cudnn_sdp, cuda.cudnn_sdp_enabled()),
    ]

    def undo() -> None:
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
        for home, name, value in flags:
            if getattr(home, name) != value:
                setattr(home, name, value)
        for enable, value in sdp:
            enable(value)

    return undo
