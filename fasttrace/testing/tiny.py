"""Whole pipelines with random weights, small enough to run in milliseconds on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    schedulers,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

WINDOW = 24  # text length
PICTURE = 16  # pixels a side
_WIDTH = 16
# fmt: off
_WORDS = [
    "a", "photo", "of", "the", "dog", "cat", "car", "red", "blue", "in", "style", "painting",
    "house", "with", "and", "on", "picture", "tiny", "big",
]
# fmt: on
# Stable Diffusion's own noise schedule.
_NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
_SCHEDULER_OPTIONS: dict[str, dict[str, Any]] = {
    "PNDM": {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1},
    "DDIM": {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
}
# Each family's own scheduler, with what it sets besides.
_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd": ("PNDM", {}),
    "sd21": ("DDIM", {"prediction_type": "v_prediction"}),
    "sdxl": ("PNDM", {}),
    "sdxl-turbo": ("EulerAncestralDiscrete", {"timestep_spacing": "trailing"}),
    "kandinsky21": ("DDIM", {}),
    "kandinsky22": ("DDPM", {"variance_type": "learned_range", "clip_sample": False}),
}
Name = Literal["sd", "sd21", "sdxl", "sdxl-turbo", "kandinsky21", "kandinsky22"]
FAMILIES: tuple[Name, ...] = get_args(Name)


def tiny_pipeline(
    family: Name = "sd",
    folder: Path | str | None = None,
    seed: int = 0,
    scheduler: str | None = None,
) -> Any:
    """A pipeline with random weights: 16x16 pictures, two UNet levels, three text layers.

    `family` "sd" is a StableDiffusionPipeline; "sd21" predicts velocities and has linear
    projections; "sdxl" and "sdxl-turbo" have two encoders and pooled text; Kandinsky 2.1 and 2.2
    have a prior and a decoder, 2.1 a multilingual encoder. `scheduler` is a diffusers class without
    its "Scheduler" ("PNDM", "DDIM", "HeunDiscrete", ...); None is the family's own. With a folder
    the pipeline is saved there and loaded again, as a user would. The global random generator is
    left alone.
    """
    own, extra = _SCHEDULERS[family]
    extra = extra if scheduler is None else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build: Any
        parts: dict[str, Any]
        if family in ("kandinsky21", "kandinsky22"):
            from fasttrace.testing.tiny_kandinsky import kandinsky_parts

            build, parts = kandinsky_parts(multilingual=family == "kandinsky21")
        else:
            build, parts = _stable_parts(family)
        parts["scheduler"] = make_scheduler(scheduler or own, **extra)
        for part in parts.values():
            if isinstance(part, torch.nn.Module):
                _spread(part)
    options: dict[str, Any] = {}
    if build is StableDiffusionXLPipeline:
        options = {"add_watermarker": False}
    elif build is StableDiffusionPipeline:
        options = {"requires_safety_checker": False}
        parts |= {"safety_checker": None, "feature_extractor": None}
    pipe = build(**parts, **options)
    if folder is not None:
        pipe.save_pretrained(folder)
        pipe = build.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipe


def tiny_clip(folder: Path | str, seed: int = 0) -> Path:
    """Save a random `CLIPModel` with its tokenizer; it looks at 16x16 pictures."""
    text = _text_config().to_dict()
    vision = {
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": PICTURE,
        "patch_size": 4,
        "projection_dim": _WIDTH,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=_WIDTH)
        model = CLIPModel(config)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)


def tiny_tokenizer() -> Any:
    """A CLIP tokenizer that knows a few words whole and spells the others out."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in _WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair, joined = (pieces[0], pieces[1]), pieces[0] + pieces[1]
            if pair not in merges:
                merges.append(pair)
            if joined not in vocabulary:
                vocabulary.append(joined)
            pieces = [joined, *pieces[2:]]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=WINDOW)


def make_scheduler(name: str, **extra: Any) -> Any:
    """One of diffusers' schedulers with Stable Diffusion's noise schedule."""
    build = getattr(schedulers, f"{name}Scheduler")
    return build(**{**_NOISE, **_SCHEDULER_OPTIONS.get(name, {}), **extra})


def _stable_parts(family: str) -> tuple[Any, dict[str, Any]]:
    """The pipeline's class and its parts, without a scheduler."""
    two = family.startswith("sdxl")
    # OpenCLIP's activation in 2.1, OpenAI's elsewhere.
    first = _text_encoder(CLIPTextModel, "gelu" if family == "sd21" else "quick_gelu")
    parts: dict[str, Any] = {
        "vae": _vae(),
        "tokenizer": tiny_tokenizer(),
        "text_encoder": first,
        "unet": _unet(family),
    }
    if two:
        parts["tokenizer_2"] = tiny_tokenizer()
        parts["text_encoder_2"] = _text_encoder(CLIPTextModelWithProjection)
    return (StableDiffusionXLPipeline if two else StableDiffusionPipeline), parts


def _text_config(hidden_act: str = "quick_gelu") -> Any:
    tokenizer = tiny_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=WINDOW,
        projection_dim=_WIDTH,
        hidden_act=hidden_act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _text_encoder(kind: Any, hidden_act: str = "quick_gelu") -> Any:
    return kind(_text_config(hidden_act))


def _vae() -> Any:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=PICTURE,
    )


def _unet(family: str) -> Any:
    options: dict[str, Any] = {
        "sample_size": PICTURE // 2,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": _WIDTH,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    if family == "sd21":
        options |= {"use_linear_projection": True, "attention_head_dim": (2, 4)}
    elif family.startswith("sdxl"):
        options |= {
            "cross_attention_dim": 2 * _WIDTH,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + _WIDTH,
        }
    return UNet2DConditionModel(**options)


def _spread(module: torch.nn.Module) -> None:
    """Larger weights where text enters: as initialised, a prompt hardly moves the picture."""
    factors = {
        "attn2.to_v": 4.0,
        "attn2.to_q": 3.0,
        "add_v_proj": 4.0,
        "to_q": 3.0,
        "token_embedding": 20.0,
        "word_embeddings": 20.0,
        "out_proj": 2.0,
    }
    with torch.no_grad():
        for name, weight in module.named_parameters():
            for part, factor in factors.items():
                if part in name and name.endswith("weight"):
                    weight.mul_(factor)
                    break
