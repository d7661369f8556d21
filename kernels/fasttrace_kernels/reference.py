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


def guided_step(
    prediction: Tensor,  # [2L, ...] with a guidance, unconditional lanes first; else [L, ...]
    state: Tensor,  # [kept, L, ...]: latents newest first, then earlier predictions newest first
    sample: Tensor,  # like prediction: the denoiser's input
    counter: Tensor,  # [2] int64: the call just made, and a ticket for the device kernels
    weights: Tensor,  # [T, S]: of latents, predictions, and noise if there is one
    input_scales: Tensor,  # [T + 1]
    guidance: Tensor | None,  # [L], or [1] for all lanes
    noise: Tensor | None,  # [T, L, ...], or [T, 1, ...] for all lanes
    latents: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The end of a denoiser call: what state, sample and counter hold afterwards.

    e = e_u + g (e_c - e_u); new latent = sum over the slots of weight * tensor, slot after slot,
    where e is the newest prediction; sample = new latent, as it is kept, * next input scale.
    """
    wide = torch.promote_types(state.dtype, torch.float32)
    scale_type = torch.promote_types(sample.dtype, torch.float32)
    if scale_type == sample.dtype:  # one that isn't rounded to a half
        scale_type = torch.promote_types(scale_type, input_scales.dtype)
    call, lanes = int(counter[0]), state.shape[1]
    new_state, new_sample = state.clone(), sample.clone()
    for lane in range(lanes):
        newest = prediction[lane].to(wide)
        if guidance is not None:
            cond = prediction[lanes + lane].to(wide)
            newest = newest + guidance[lane if len(guidance) > 1 else 0].to(wide) * (cond - newest)
        old = list(state[:, lane])
        slots = [*old[:latents], newest, *old[latents:]]
        if noise is not None:
            slots.append(noise[call, lane if noise.shape[1] > 1 else 0])
        total = weights[call, 0].to(wide) * slots[0].to(wide)
        for slot in range(1, len(slots)):
            total = total + weights[call, slot].to(wide) * slots[slot].to(wide)
        latent = total.to(state.dtype)
        kept = [latent, *old[: latents - 1]]
        if len(old) > latents:
            kept += [newest.to(state.dtype), *old[latents:-1]]
        new_state[:, lane] = torch.stack(kept)
        scaled = latent.to(scale_type) * input_scales[call + 1].to(scale_type)
        for branch in range(len(sample) // lanes):
            new_sample[branch * lanes + lane] = scaled.to(sample.dtype)
    return new_state, new_sample, counter + counter.new_tensor([1, 0])


def patch_attention(
    query: Tensor,  # [L, H, N, D]
    key: Tensor,  # [S, H, n, D]
    value: Tensor,  # [S, H, n, D]
    kv_index: Tensor | None = None,  # [L] int: which slot of key and value a lane reads
    index: Tensor | None = None,  # [L, H] int: whose result a head takes; -1 is none
    strength: Tensor | None = None,  # [L, N] or [L, 1] float32: how much of it
    scale: float | None = None,  # of the scores; None is D ** -0.5
) -> Tensor:
    """own + s * (source's - own), where own is softmax(scale * query @ key.T) @ value."""
    return patch_attention_maps(query, key, value, kv_index, index, strength, scale)[0]


def patch_attention_maps(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_index: Tensor | None = None,
    index: Tensor | None = None,
    strength: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`patch_attention`, and its probabilities [L, H, N, n], treated alike."""
    wide = torch.promote_types(query.dtype, torch.float32)
    lanes, heads, tokens, size = query.shape
    own_out = torch.empty_like(query)
    own_maps = torch.empty(lanes, heads, tokens, key.shape[2], dtype=wide)
    for lane in range(lanes):
        slot = lane if kv_index is None else int(kv_index[lane])
        for head in range(heads):
            q, k, v = (x.to(wide) for x in (query[lane, head], key[slot, head], value[slot, head]))
            scores = q @ k.T * (size**-0.5 if scale is None else scale)
            own_maps[lane, head] = torch.softmax(scores, -1)
            own_out[lane, head] = (own_maps[lane, head] @ v).to(query.dtype)
    out, maps = own_out.clone(), own_maps.clone()
    for lane in range(lanes):
        for head in range(heads):
            source = -1 if index is None else int(index[lane, head])
            if source == -1:
                continue
            s = torch.ones(1, 1) if strength is None else strength[lane].to(wide)[:, None]
            for result, own in ((out, own_out), (maps, own_maps)):
                old, new = own[lane, head], own[source, head]
                between = (old.to(wide) + s * (new.to(wide) - old.to(wide))).to(own.dtype)
                result[lane, head] = torch.where(s == 0, old, torch.where(s == 1, new, between))
    return out, maps
