"""Triton where it is installed; where it isn't, kernels are defined but can't be launched."""

from __future__ import annotations

from functools import cache
from typing import Any

try:
    import triton
    import triton.language as tl

    jit: Any = triton.jit
    available = True
except ImportError:
    triton = tl = None
    available = False

    def jit(function: Any) -> Any:
        return function


@cache
def ptxas_version() -> tuple[int, int]:
    """Of the assembler that Triton runs for NVIDIA's GPUs; (0, 0) where it doesn't say."""
    try:
        major, minor = triton.knobs.nvidia.ptxas.version.split(".")[:2]
        return int(major), int(minor)
    except Exception:
        return 0, 0


__all__ = ["available", "jit", "ptxas_version", "tl", "triton"]
