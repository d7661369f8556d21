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
    # 1 - p and G - s as sums over the other tokens: differences would lose all digits at p = 1.
    rest = _others(p)
    above = rest * inner - _others(p * inner)
    # p (r - 1) / (1 + p (r - 1)) without r itself, which overflows; `fall` is r or 1 / r.
    fall = torch.exp(-change.abs())
    step = -p * torch.expm1(-change.abs())
    whole = torch.where(change > 0, p + rest * fall, rest + p * fall)
    taken = torch.where(change > 0, step, -step) / whole.clamp_min(torch.finfo(wide).tiny)
    return (taken * above).sum(-2)


def _others(parts: Tensor) -> Tensor:
    """Along the last axis, the sum of all entries but the own."""
    none = torch.zeros_like(parts[..., :1])
    before = torch.cat([none, parts[..., :-1]], -1).cumsum(-1)
    after = torch.cat([none, parts.flip(-1)[..., :-1]], -1).cumsum(-1).flip(-1)
    return before + after
