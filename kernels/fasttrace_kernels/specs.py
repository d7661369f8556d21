"""One record an op: what its tests and its bench need to know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import guided_step, reference
from .patch_attention import (
    fallback,
    fallback_maps,
    launch,
    launch_maps,
    patch_attention,
    patch_attention_maps,
)
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
    Triton's, `fallback` the CPU's where nothing is compiled. Each returns its results, or leaves
    them in the arguments that `written` names; `outcome` is for either way.
    `tolerance` is relative to max(|value|, rms), by dtype of the result.
    """

    name: str
    reference: Callable[..., Any]
    op: Callable[..., Any]
    launch: Callable[..., Any]
    fallback: Callable[..., Any]
    example: Callable[[tuple[int, ...], torch.dtype, int], dict[str, Any]]
    shapes: Mapping[str, tuple[int, ...]]
    tolerance: Mapping[torch.dtype, float]
    written: tuple[str, ...] = ()

    def outcome(self, form: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """What one of the four forms makes of the arguments, which stay as they are."""
        copies = {name: arguments[name].clone() for name in self.written}
        returned = form(**{**arguments, **copies})
        if returned is None:
            return tuple(copies.values())
        return returned if isinstance(returned, tuple) else (returned,)


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
    written=("out",),
)


def _guided_step_example(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """shape = (latents, predictions, L, *row). Guided and with noise; the second of three calls."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    latents, predictions, lanes, *row = shape
    return {
        "prediction": draw(2 * lanes, *row).to(dtype),
        "state": draw(latents + predictions - 1, lanes, *row).to(dtype),
        "sample": torch.full((2 * lanes, *row), float("nan"), dtype=dtype),
        "counter": torch.tensor([1, 0]),
        "weights": draw(3, latents + predictions + 1),
        "input_scales": draw(4),
        "guidance": draw(lanes),
        "noise": draw(3, lanes, *row).to(dtype),
        "latents": latents,
    }


GUIDED_STEP = Spec(
    name="guided_step",
    reference=reference.guided_step,
    op=guided_step.guided_step_,
    launch=guided_step.launch_,
    fallback=guided_step.fallback_,
    example=_guided_step_example,
    shapes={
        "one element": (1, 1, 1, 1),
        "one lane": (2, 4, 1, 4, 5, 7),
        "two latents kept": (2, 1, 3, 33),
        "two predictions kept": (1, 3, 3, 4, 6, 6),
        "all that can be kept": (4, 4, 2, 3, 5, 5),
    },
    # Nothing is fused and every form rounds in the same places.
    tolerance=dict.fromkeys(_LERP, 0.0),
    written=("state", "sample", "counter"),
)


def _patch_attention_example(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> dict[str, Tensor]:
    """shape = (L, S, H, N, n, D). A third of the heads takes nothing; strengths 0 and 1 occur."""
    generator = torch.Generator().manual_seed(seed)
    lanes, slots, heads, tokens, keys, size = shape

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    kept = torch.rand(lanes, heads, generator=generator) < 1 / 3
    strength = torch.rand(lanes, tokens, generator=generator) * 1.5 - 0.25
    return {
        "query": draw(lanes, heads, tokens, size),
        "key": draw(slots, heads, keys, size),
        "value": draw(slots, heads, keys, size),
        "kv_index": torch.randint(slots, (lanes,), generator=generator),
        "index": torch.randint(lanes, kept.shape, generator=generator).masked_fill(kept, -1),
        "strength": strength.round(decimals=1).clamp(0, 1),
    }


_ATTENTION_SHAPES: dict[str, tuple[int, ...]] = {
    "one element": (1, 1, 1, 1, 1, 1),
    "text": (3, 2, 2, 33, 77, 40),
    "picture": (2, 2, 2, 90, 90, 64),
}
# float32: sums of up to 160 products in another order. Halves: the result is rounded once, and so
# are the weights, whose errors average out; then a lerp of two such results is rounded again.
_SUMS = {
    dtype: factor * torch.finfo(dtype).eps
    for dtype, factor in ((torch.float32, 40), (torch.float16, 3), (torch.bfloat16, 3))
}

PATCH_ATTENTION = Spec(
    name="patch_attention",
    reference=reference.patch_attention,
    op=patch_attention,
    launch=launch,
    fallback=fallback,
    example=_patch_attention_example,
    shapes=_ATTENTION_SHAPES,
    tolerance=_SUMS,
)

PATCH_ATTENTION_MAPS = Spec(
    name="patch_attention_maps",
    reference=reference.patch_attention_maps,
    op=patch_attention_maps,
    launch=launch_maps,
    fallback=fallback_maps,
    example=_patch_attention_example,
    shapes=_ATTENTION_SHAPES,
    tolerance=_SUMS,
)

SPECS = (PATCH_ROWS, GUIDED_STEP, PATCH_ATTENTION, PATCH_ATTENTION_MAPS)
