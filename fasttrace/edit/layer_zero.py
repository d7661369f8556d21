"""What layer 0's out_proj reads, every distinct token projected once.

Below its attention nothing mixes tokens: embedding, norm, queries, keys and values depend on a
token and its place alone. Thousands of prompts have few of those, since most of them is padding.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPTextEmbeddings

from fasttrace.adapters.text import TextEncoder


def is_layer_zero(encoder: TextEncoder, modules: Mapping[str, nn.Module]) -> bool:
    """Whether `modules` is layer 0's out_proj alone, in a layer that computes what is meant here.

    Another class, a mask of the padding or a hook may do otherwise: the encoder itself has to run.
    """
    if not encoder.causal:
        return False
    core, layer = encoder.core, encoder.layers[0]
    if [*modules.values()] != [getattr(layer.self_attn, "out_proj", None)]:
        return False
    if (
        type(layer.self_attn) is not CLIPAttention
        or type(core.embeddings) is not CLIPTextEmbeddings
    ):
        return False
    if getattr(encoder.module.config, "use_attention_mask", False):
        return False
    parts = [encoder.module, core, *core.embeddings.modules(), core.encoder, *layer.modules()]
    return not any(part._forward_pre_hooks or part._forward_hooks for part in parts)


def read_layer_zero(encoder: TextEncoder, ids: Tensor) -> Tensor:
    """The inputs [prompts, n, d] of layer 0's out_proj for token ids [prompts, n]."""
    attention, window = encoder.layers[0].self_attn, ids.shape[-1]
    places = torch.arange(window, device=ids.device)
    distinct, which = torch.unique(ids * window + places, return_inverse=True)
    # One token a row, at its own place.
    rows = encoder.core.embeddings(distinct[:, None] // window, distinct[:, None] % window)[:, 0]
    rows = encoder.layers[0].layer_norm1(rows)
    query, key, value = (
        project(rows)[which].unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    found = scaled_dot_product_attention(query, key, value, is_causal=True, scale=attention.scale)
    return found.transpose(1, 2).flatten(2)
