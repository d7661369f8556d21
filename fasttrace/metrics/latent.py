"""Scores that need no second model: how far a final latent is from the clean run's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttrace.errors import ModelError
from fasttrace.types import MetricContext


def distance(latents: Tensor, context: MetricContext) -> Tensor:
    """Root mean square difference [B] of latents [B, C, h, w] to the clean run's."""
    return _rms(latents - _needed(context.clean_latent, "clean").to(latents))


def recovery(latents: Tensor, context: MetricContext) -> Tensor:
    """1 - |x - clean| / |corrupt - clean|: 1 at the clean run, 0 at the corrupt one. [B]

    Below 0 where patching leads further away than the corruption did; NaN-free: where the two runs
    are the same there is nothing to recover and the result is 0.
    """
    clean = _needed(context.clean_latent, "clean")
    whole = _rms(_needed(context.corrupt_latent, "corrupt") - clean).to(latents)
    left = _rms(latents - clean.to(latents))
    return torch.where(whole > 0, 1 - left / whole.clamp_min(torch.finfo(whole.dtype).tiny), 0)


def _needed(latent: Any, name: str) -> Tensor:
    if latent is None:
        raise ModelError(f"A latent metric needs the {name} run's latent, which is missing.")
    found: Tensor = latent.float()
    return found


def _rms(difference: Tensor) -> Tensor:
    return difference.float().square().flatten(1).mean(1).sqrt()
