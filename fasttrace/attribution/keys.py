"""Swapping one key of an attention, through the softmax instead of along its slope."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def swapped_keys(
    query: Tensor,
    keys: Tensor,
    new_keys: Tensor,
    values: Tensor,
    gradient: Tensor,
    scale: float | None = None,
) -> Tensor:
    """What each key's swap alone does to a score that is linear in what is attended: [B, H, n].

    query [B, H, N, D], keys and new_keys [B, H, n, D], values [B, H, n, E]; gradient
    [B, H, N, E] of the score in the attended [B, H, N, E]. With p the probabilities, r the ratio of
    exponentiated logits, G = <gradient, value> the gradient in p and s its p-weighted mean:
    dM_j = sum_i p_ij (r_ij - 1) (G_ij - s_i) / (1 + p_ij (r_ij - 1)).
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    query, keys, new_keys, values, gradient = (
        t.to(wide) for t in (query, keys, new_keys, values, gradient)
    )
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = factor * query @ keys.transpose(-1, -2)
    change = factor * query @ (new_keys - keys).transpose(-1, -2)
    p = logits.softmax(-1)
    inner = gradient @ values.transpose(-1, -2)
    mean = (p * inner).sum(-1, keepdim=True)
    # p (r - 1) / (1 + p (r - 1)) without r itself, which overflows; `fall` is r or 1 / r.
    fall = torch.exp(-change.abs())
    step = p * (1 - fall)
    rising = step / (fall + step).clamp_min(torch.finfo(wide).tiny)
    falling = -step / (1 - step).clamp_min(torch.finfo(wide).tiny)
    taken = torch.where(change > 0, rising, falling)
    return (taken * (inner - mean)).sum(-2)
