"""Can this pipeline be traced as it stands? A sentence if not."""

from __future__ import annotations

from typing import Any

from torch import nn

from fasttrace.adapters.scope import pipeline_modules
from fasttrace.errors import ModelError

_NEEDED = ("unet", "vae", "scheduler", "tokenizer", "text_encoder")


def check_ready(pipe: Any) -> None:
    """Raise `ModelError` unless `pipe` is a whole, resident Stable-Diffusion-like pipeline."""
    parts = getattr(pipe, "components", None)
    if parts is None or not hasattr(pipe, "encode_prompt"):
        raise ModelError(
            f"{type(pipe).__name__} is not a text-to-image pipeline: expected a diffusers pipeline "
            "with a UNet, a text encoder and `encode_prompt`."
        )
    if parts.get("unet") is None:
        other = "transformer" if parts.get("transformer") is not None else "no denoiser"
        raise ModelError(
            f"{type(pipe).__name__} has no UNet (found: {other}); fasttrace traces the UNet "
            "pipelines of Stable Diffusion 1.x, 2.x and XL."
        )
    missing = [n for n in _NEEDED if parts.get(n) is None]
    if "text_encoder_2" in parts:
        missing += [n for n in ("tokenizer_2", "text_encoder_2") if parts.get(n) is None]
    if missing:
        raise ModelError(
            f"{type(pipe).__name__} was loaded without {', '.join(missing)}; load it whole."
        )
    _check_unet(pipe.unet, pipe.vae)
    parts = pipeline_modules(pipe)
    _check_resident(parts)
    _check_dtypes(parts)
    _check_scheduler(pipe.scheduler)


def _check_unet(unet: nn.Module, vae: nn.Module) -> None:
    config: Any = unet.config
    latent = getattr(vae.config, "latent_channels", None)
    if config.in_channels != latent:
        raise ModelError(
            f"The UNet reads {config.in_channels} channels, latents have {latent}: "
            "this is an inpainting or image-conditioned model, without runs from a prompt alone."
        )
    extra = getattr(config, "encoder_hid_dim_type", None)
    if extra not in (None, "text_proj"):
        raise ModelError(
            f"The UNet's text goes through '{extra}' (an image adapter); unload the adapter first."
        )
    added = getattr(config, "addition_embed_type", None)
    if added not in (None, "text_time"):
        raise ModelError(f"UNets with addition_embed_type '{added}' are not supported.")
    chunked = [n for n, m in unet.named_modules() if getattr(m, "_chunk_size", None) is not None]
    if chunked:
        raise ModelError(
            f"Feed-forward chunking is on in {len(chunked)} blocks (first: {chunked[0]}), so their "
            "outputs never exist whole; call set_chunk_feed_forward(None, 0) on those blocks."
        )


def _check_resident(parts: dict[str, nn.Module]) -> None:
    places = {}
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if name not in parts:
            continue
        part = parts[name]
        if any(hasattr(m, "_hf_hook") for m in part.modules()):
            raise ModelError(
                f"{name} is offloaded (accelerate moves its weights in and out); load the pipeline "
                "without offloading, or call pipe.remove_all_hooks() and pipe.to(device)."
            )
        tensors = list(part.named_parameters()) + list(part.named_buffers())
        meta = [n for n, t in tensors if t.is_meta]
        if meta:
            raise ModelError(
                f"{name} has {len(meta)} weights on the meta device (first: {meta[0]}), which hold "
                "no numbers; load the weights first."
            )
        places[name] = {str(t.device) for _, t in part.named_parameters()}
    devices = sorted(set().union(*places.values()))
    if len(devices) > 1:
        where = ", ".join(f"{n} on {'+'.join(sorted(d))}" for n, d in places.items())
        raise ModelError(f"The pipeline is spread over devices ({where}); call pipe.to(device).")


def _check_dtypes(parts: dict[str, nn.Module]) -> None:
    """The VAE may have its own: SDXL's is wider than the rest."""
    found = {}
    for name in ("unet", "text_encoder", "text_encoder_2"):
        weights = parts[name].parameters() if name in parts else ()
        kinds = [p.dtype for p in weights if p.is_floating_point()]
        if kinds:
            found[name] = str(kinds[0]).removeprefix("torch.")
    if len(set(found.values())) > 1:
        what = ", ".join(f"{name} in {dtype}" for name, dtype in found.items())
        raise ModelError(
            f"The pipeline mixes dtypes ({what}); load it with one, such as dtype=torch.float32."
        )


def _check_scheduler(scheduler: Any) -> None:
    lacking = [
        n for n in ("set_timesteps", "step", "init_noise_sigma") if not hasattr(scheduler, n)
    ]
    if lacking:
        raise ModelError(
            f"The scheduler {type(scheduler).__name__} has no {', '.join(lacking)}; "
            "set pipe.scheduler to one of diffusers' schedulers."
        )
