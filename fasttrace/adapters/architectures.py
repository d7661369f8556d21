"""Published configurations of known models, as data: their sites can be listed without a download.

Sources: the `unet/config.json` and `text_encoder*/config.json` of the models named beside each, and
where it says so the scripts and fine-tuned copies that repeat them.
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

_ADDED_UNET: dict[str, Any] = {
    "sample_size": 64,
    "down_block_types": ("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
    "layers_per_block": 3,
    "attention_head_dim": 64,
    "resnet_time_scale_shift": "scale_shift",
}

_KANDINSKY_UNET: dict[str, Any] = {
    **_ADDED_UNET,
    "in_channels": 4,
    "out_channels": 8,  # the noise and its variance
    "block_out_channels": (384, 768, 1152, 1536),
    "cross_attention_dim": 768,
}

# diffusers' scripts/convert_kandinsky_to_diffusers.py
_KANDINSKY21_UNET: dict[str, Any] = {
    **_KANDINSKY_UNET,
    "encoder_hid_dim": 1024,
    "encoder_hid_dim_type": "text_image_proj",
    "addition_embed_type": "text_image",
}

# As in pipelines fine-tuned from it: huggingface.co/YiYiXu/yiyi_kandinsky_decoder.
_KANDINSKY22_UNET: dict[str, Any] = {
    **_KANDINSKY_UNET,
    "encoder_hid_dim": 1280,
    "encoder_hid_dim_type": "image_proj",
    "addition_embed_type": "image",
}

# As in a pipeline fine-tuned from it, huggingface.co/lucostiguy11/dreambooth_if; the model's own
# config.yml and diffusers' scripts/convert_if.py give the same.
_IF_UNET: dict[str, Any] = {
    **_ADDED_UNET,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (704, 1408, 2112, 2816),
    "cross_attention_dim": 2816,
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
    "act_fn": "gelu",
}

# huggingface.co/kandinsky-community/kandinsky-2-1-prior; 2.2's is as wide as bigG.
_PRIOR21: dict[str, Any] = {
    "embedding_dim": 768,
    "num_embeddings": 77,
    "additional_embeddings": 4,
    "num_attention_heads": 32,
    "attention_head_dim": 64,
    "num_layers": 20,
}
_PRIOR22: dict[str, Any] = {**_PRIOR21, "embedding_dim": 1280}

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

# Kandinsky 2.1's own: M-CLIP/XLM-Roberta-Large-Vit-L-14. The pipeline reads 77 tokens.
_XLM_ROBERTA: dict[str, Any] = {
    "vocab_size": 250_002,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
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
    # stabilityai/sdxl-turbo: distilled from it, drawn at 512 pixels
    "sdxl-turbo": {
        "unet": {**_XL_UNET, "sample_size": 64},
        "text_encoder": _CLIP_L,
        "text_encoder_2": _OPEN_CLIP_BIGG,
    },
    # kandinsky-community/kandinsky-2-1 and -2-1-prior
    "kandinsky21": {
        "unet": _KANDINSKY21_UNET,
        "prior": _PRIOR21,
        "prior_text_encoder": {**_CLIP_L, "projection_dim": 768},
        "text_encoder": _XLM_ROBERTA,
    },
    # kandinsky-community/kandinsky-2-2-decoder and -2-2-prior
    "kandinsky22": {
        "unet": _KANDINSKY22_UNET,
        "prior": _PRIOR22,
        "prior_text_encoder": _OPEN_CLIP_BIGG,
    },
    # DeepFloyd/IF-I-XL-v1.0, the first of its three stages
    "if": {"unet": _IF_UNET},
}

_PRIOR_NOTE = (
    "The prior, which turns the text into the image embedding that the decoder reads, is a "
    "denoiser of its own: its 40 sites (20 attn1, 20 ff) are listed and counted with component "
    "'prior', not traced; its text encoder is."
)
_ADDED_NOTE = (
    "added_kv: one attention over the picture's own places and the {what}, whose keys and values "
    "are added; its output holds the stream that enters it, as a resnet's does."
)
_IF_NOTE = (
    "DeepFloyd IF is listed and counted, not traced: it draws in pixels, in three stages of which "
    "these are the first's sites, and its text encoder is T5."
)

# What a listing says beside its sites.
NOTES: dict[str, tuple[str, ...]] = {
    "sdxl-turbo": ("SDXL's sites; distilled without guidance, so a call has one branch.",),
    "kandinsky21": (_ADDED_NOTE.format(what="image and text embeddings"), _PRIOR_NOTE),
    "kandinsky22": (_ADDED_NOTE.format(what="image embedding"), _PRIOR_NOTE),
    "if": (
        _ADDED_NOTE.format(what="T5 text embedding"),
        _IF_NOTE,
    ),
}

# Where the weights are, for messages: an architecture's name alone loads nothing.
WEIGHTS = {
    "sd14": "CompVis/stable-diffusion-v1-4",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "openjourney": "prompthero/openjourney",
    "sd21": "stabilityai/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sdxl-turbo": "stabilityai/sdxl-turbo",
    "kandinsky21": "kandinsky-community/kandinsky-2-1",
    "kandinsky22": "kandinsky-community/kandinsky-2-2-decoder",
    "if": "DeepFloyd/IF-I-XL-v1.0",
}

# The published pipelines' own schedulers: PNDM makes one call more than it has steps.
SCHEDULERS = {
    "sd14": "PNDM",
    "sd15": "PNDM",
    "openjourney": "PNDM",
    "sd21": "DDIM",
    "sdxl": "EulerDiscrete",
    "sdxl-turbo": "EulerAncestralDiscrete",
    "kandinsky21": "DDIM",
    "kandinsky22": "DDPM",
    "if": "DDPM",
}
# Of the pipeline's call; 7.5 elsewhere. SDXL-Turbo was distilled without guidance.
GUIDANCE = {"sdxl": 5.0, "sdxl-turbo": 0.0, "kandinsky21": 4.0, "kandinsky22": 4.0, "if": 7.0}
STEPS = {"sdxl-turbo": 1, "kandinsky21": 100, "kandinsky22": 100, "if": 100}  # 50 elsewhere
# A variance is read from their prediction, so their schedules are no weighted sums.
LEARNED = ("kandinsky22",)
# Listed and counted alone.
UNTRACED = ("if",)
