"""A change as a LoRA: its singular values, and how many of them a file needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fasttrace.edit.solver import Change

# Of the largest singular value: smaller ones move no float32 weight.
ZERO = 1e-7


@dataclass(frozen=True)
class Factors:
    """`up @ down`: up [m, r], down [r, d], float64, each with the root of the singular values.

    rank: the change's own, numerically. discarded: share of the change's norm left out.
    """

    up: Tensor
    down: Tensor
    rank: int
    discarded: float


def factorise(change: Change, most: int | None = None) -> Factors:
    """The best approximation of rank `most`; all of the change where not given."""
    left, right = change.left, change.right
    if not change.whole and left.shape[-1] <= min(left.shape[-2], right.shape[-1]):
        q, middle = torch.linalg.qr(left)
        p, other = torch.linalg.qr(right.mT)
        u, values, v = torch.linalg.svd(middle @ other.mT, full_matrices=False)
        u, v = q @ u, v @ p.mT
    else:
        u, values, v = torch.linalg.svd(change.dense, full_matrices=False)
    rank = int((values > ZERO * values[0]).sum())
    kept = max(1, min(rank, most or rank))
    total = float(values.norm())
    discarded = float(values[kept:].norm()) / total if total else 0.0
    root = values[:kept].sqrt()
    return Factors(u[:, :kept] * root, root[:, None] * v[:kept], rank, discarded)
