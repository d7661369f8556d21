"""Triton where it is installed; where it isn't, kernels are defined but can't be launched."""

from __future__ import annotations

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


__all__ = ["available", "jit", "tl", "triton"]
