"""What a traced graph takes for granted about a denoiser."""

from __future__ import annotations

from typing import Any

from torch import nn


def structure_of(denoiser: nn.Module) -> Any:
    """Compares unequal once a graph traced before must be traced again.

    Seen: which modules there are and which tensors they own, their shapes, dtypes and devices,
    hooks, attention processors, training mode. Not part of it: the tensors' values. A graph reads
    them anew at every call, and everything computed from them beforehand is computed again at the
    start of every run, so an edit in place needs no new trace.
    """
    found: list[Any] = []
    for name, module in denoiser.named_modules():
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        hooks = (module._forward_hooks, module._forward_pre_hooks)
        found.append(
            (
                name,
                id(module),
                module.training,
                id(getattr(module, "processor", None)),
                "forward" in vars(module) and id(vars(module)["forward"]),
                tuple((n, id(t), tuple(t.shape), t.dtype, t.device) for n, t in tensors),
                tuple(tuple(map(id, h.values())) for h in hooks),
            )
        )
    return found
