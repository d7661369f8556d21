"""One record an op: what its tests and its bench need to know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference
from .patch_rows import fallback_, launch_, patch_rows

# Two units in the last place: a GPU may fuse a multiply and an add and round differently.
_LERP = {
    dtype: 2 * torch.finfo(dtype).eps
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


@dataclass(frozen=True)
class Spec:
    """All four forms take what `example(shape, dtype, seed)` returns, by name.

    `op` goes through the dispatcher (to the compiled kernel where there is one), `launch` is
    Triton's, `fallback` the CPU's where nothing is compiled; these two write into their first
    argument.
    `tolerance` is relative to max(|value|, rms), by dtype of the result.
    """

    name: str
    reference: Callable[..., Tensor]
    op: Callable[..., Any]
    launch: Callable[..., None]
    fallback: Callable[..., None]
    example: Callable[[tuple[int, ...], torch.dtype, int], dict[str, Tensor]]
    shapes: Mapping[str, tuple[int, ...]]
    tolerance: Mapping[torch.dtype, float]


def _patch_rows_example(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """shape = (L, S, *row). A third of the lanes is not patched; strengths 0 and 1 occur."""
    generator = torch.Generator().manual_seed(seed)
    lanes, rows, *row = shape
    kept = torch.rand(lanes, generator=generator) < 1 / 3
    index = torch.randint(rows, (lanes,), generator=generator).masked_fill(kept, -1)
    strength = torch.rand(lanes, generator=generator) * 1.5 - 0.25
    return {
        "out": torch.randn(lanes, *row, generator=generator).to(dtype),
        "source": torch.randn(rows, *row, generator=generator).to(dtype),
        "index": index,
        "strength": strength.round(decimals=1).clamp(-0.2, 1),
    }


PATCH_ROWS = Spec(
    name="patch_rows",
    reference=reference.patch_rows,
    op=patch_rows,
    launch=launch_,
    fallback=fallback_,
    example=_patch_rows_example,
    shapes={
        "one element": (1, 1, 1),
        "pooled text": (3, 2, 768),
        "tokens": (8, 3, 77, 40),
        "odd tokens": (5, 2, 13, 33),
        "image": (4, 2, 6, 7, 9),
    },
    tolerance=_LERP,
)

SPECS = (PATCH_ROWS,)
