"""What every op computes, in plain PyTorch and float32. Read this first.

Nothing here is shared with the fast forms, so that a mistake in one can't hide in the other.
"""

from __future__ import annotations

import torch
from torch import Tensor


def patch_rows(
    out: Tensor,  # [L, ...]: one row a lane
    source: Tensor,  # [S, ...]: the rows that can be read
    index: Tensor,  # [L] int: which row of source a lane reads; -1 is none
    strength: Tensor,  # [L] float32: how much of it
    mask: Tensor | None = None,  # broadcasts against out from the left: [L, N] for [L, N, C]
) -> Tensor:
    """out + s * (source[index] - out), with s = strength * mask; exact at s = 0 and s = 1."""
    wide = torch.promote_types(out.dtype, torch.float32)
    result = out.clone()
    for lane, row in enumerate(index.tolist()):
        if row == -1:
            continue
        s = strength[lane].to(wide)
        if mask is not None:
            from_left = mask.reshape(mask.shape + (1,) * (out.dim() - mask.dim()))
            s = s * from_left[lane if mask.shape[0] > 1 else 0].to(wide)
        old, new = out[lane], source[row]
        between = (old.to(wide) + s * (new.to(wide) - old.to(wide))).to(out.dtype)
        result[lane] = torch.where(s == 0, old, torch.where(s == 1, new, between))
    return result
