"""Published configurations of known models, as data: their sites can be listed without a download.

Sources: the `unet/config.json` and `text_encoder*/config.json` of the models named beside each.
"""

from __future__ import annotations

from typing import Any

_CROSS, _DOWN, _UP, _UP_CROSS = (
    "CrossAttnDownBlock2D",
    "DownBlock2D",
    "UpBlock2D",
    "CrossAttnUpBlock2D",
)

_SD1_UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": (_CROSS, _CROSS, _CROSS, _DOWN),
    "up_block_types": (_UP, _UP_CROSS, _UP_CROSS, _UP_CROSS),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}

_SD2_UNET: dict[str, Any] = {
    **_SD1_UNET,
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}

_XL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": (_DOWN, _CROSS, _CROSS),
    "up_block_types": (_UP_CROSS, _UP_CROSS, _UP),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

_CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}

_OPEN_CLIP_H: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 23,  # of 24: the checkpoint stops where the denoiser reads
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
}

_OPEN_CLIP_BIGG: dict[str, Any] = {
    "hidden_size": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "intermediate_size": 5120,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}

ARCHITECTURES: dict[str, dict[str, dict[str, Any]]] = {
    # CompVis/stable-diffusion-v1-4
    "sd14": {"unet": _SD1_UNET, "text_encoder": _CLIP_L},
    # stable-diffusion-v1-5/stable-diffusion-v1-5
    "sd15": {"unet": _SD1_UNET, "text_encoder": _CLIP_L},
    # prompthero/openjourney: fine-tuned from 1.5
    "openjourney": {"unet": _SD1_UNET, "text_encoder": _CLIP_L},
    # stabilityai/stable-diffusion-2-1
    "sd21": {"unet": _SD2_UNET, "text_encoder": _OPEN_CLIP_H},
    # stabilityai/stable-diffusion-xl-base-1.0
    "sdxl": {"unet": _XL_UNET, "text_encoder": _CLIP_L, "text_encoder_2": _OPEN_CLIP_BIGG},
}

# Where the weights are, for messages: an architecture's name alone loads nothing.
WEIGHTS = {
    "sd14": "CompVis/stable-diffusion-v1-4",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "openjourney": "prompthero/openjourney",
    "sd21": "stabilityai/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}

# The published pipelines' own schedulers: PNDM makes one call more than it has steps.
SCHEDULERS = {
    "sd14": "PNDM",
    "sd15": "PNDM",
    "openjourney": "PNDM",
    "sd21": "DDIM",
    "sdxl": "EulerDiscrete",
}
GUIDANCE = {"sdxl": 5.0}  # of the pipeline's call; 7.5 elsewhere
