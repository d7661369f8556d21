"""Gradients of one call, in half precision too: scaled so that they neither vanish nor overflow."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fasttrace.errors import ModelError

HALF = (torch.float16, torch.bfloat16)
# The largest entry of a lane's cotangent is brought to between a half and one times these.
# Gradients inside may be far larger or smaller, so others are tried where the first doesn't do.
SCALES = (2.0**6, 2.0**-2, 2.0**-10, 2.0**12)


def gradients(
    prediction: Tensor,
    cotangent: Tensor,
    at: Mapping[str, Tensor],
    where: str,
    *,
    lanes: int,
    keep: bool = False,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """d <cotangent, prediction> / d each tensor of `at`, in float32 (float64 of a float64 model).

    cotangent [rows, ...]: like the prediction, not in half precision; rows are `lanes`, or twice as
    many, unconditional ones first. Every tensor of `at` has a row a row or a row a lane. What the
    prediction doesn't depend on is left out. keep: the graph, for other cotangents. dtype: in which
    it is computed; None is the prediction's. `at` is in execution order.

    Raises `ModelError`, with the first place that is at fault on the way back and `where`, for
    gradients that are not finite, and in half precision for those that vanish altogether.
    """
    names, tensors = list(at), list(at.values())

    def pull(scaled: Tensor, keep: bool) -> dict[str, Tensor]:
        found = torch.autograd.grad(
            prediction, tensors, scaled.to(prediction), retain_graph=keep, allow_unused=True
        )
        return {n: g for n, g in zip(names, found, strict=True) if g is not None}

    dtype = dtype or prediction.dtype
    if dtype not in HALF:
        known = pull(cotangent, keep)
        if bad := _not_finite(known):
            raise ModelError(f"The gradient is not finite at {bad[-1]} in {where}.")
        return known
    largest = cotangent.abs().reshape(-1, lanes, cotangent[0].numel()).amax((0, 2))
    if not bool(torch.isfinite(largest).all()):
        raise ModelError(f"The gradient of the latents is not finite in {where}.")
    exponent = torch.frexp(largest).exponent
    best: dict[str, Tensor] = {}
    bad, zero = list[str](), list[str]()
    for i, scale in enumerate(SCALES):
        # Powers of two, so that scaling itself rounds nothing.
        factor = torch.ldexp(torch.full_like(largest, scale), -exponent)
        factor = torch.where(largest > 0, factor, 1)
        known = pull(cotangent * _rows(factor, cotangent), keep or i < len(SCALES) - 1)
        infinite = set(_not_finite(known))
        for name, gradient in known.items():
            vanished = name not in best or not bool(best[name].any())
            if name not in infinite and vanished:
                best[name] = gradient.float() / _rows(factor, gradient)
        bad = [name for name in known if name not in best]
        zero = [name for name in known if name in best and not bool(best[name].any())]
        if not bad and (not zero or not bool(largest.any())):
            return best
    fault = (bad or zero)[-1]
    word = "is not finite" if bad else "vanishes"
    raise ModelError(
        f"In {dtype} the gradient {word} at {fault} in {where}, at every scale tried; "
        "load the model in float32."
    )


def _rows(factor: Tensor, like: Tensor) -> Tensor:
    """A factor a lane, for the rows of `like`."""
    repeated = factor.repeat(len(like) // len(factor))
    return repeated.reshape(-1, *(1,) * (like.dim() - 1))


def _not_finite(known: Mapping[str, Tensor]) -> list[str]:
    """One look at the device for all of them."""
    if not known:
        return []
    fine = torch.stack([torch.isfinite(g).all() for g in known.values()])
    if bool(fine.all()):
        return []
    return [name for name, ok in zip(known, fine.tolist(), strict=True) if not ok]
