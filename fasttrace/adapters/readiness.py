"""Can this pipeline be traced as it stands? A sentence if not."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from fasttrace.adapters.scope import pipeline_modules
from fasttrace.errors import ModelError

_STABLE = ("unet", "vae", "scheduler", "tokenizer", "text_encoder")
_KANDINSKY = (
    "unet",
    "movq",
    "scheduler",
    "prior_prior",
    "prior_scheduler",
    "prior_tokenizer",
    "prior_text_encoder",
    "prior_image_encoder",
)
_COMBINED = (
    "diffusers.AutoPipelineForText2Image.from_pretrained('kandinsky-community/kandinsky-2-2-decoder'"
    "), or fasttrace.load of the same, gives both"
)


def check_stable(pipe: Any) -> None:
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
            "pipelines of Stable Diffusion 1.x, 2.x and XL, and Kandinsky 2.1 and 2.2."
        )
    if "vae" not in parts and type(pipe).__name__.startswith("IF"):
        raise ModelError(
            f"{type(pipe).__name__} is DeepFloyd IF, whose sites are listed (`fasttrace sites if`) "
            "and not traced: it draws in pixels, in three stages."
        )
    missing = [n for n in _STABLE if parts.get(n) is None]
    if "text_encoder_2" in parts:
        missing += [n for n in ("tokenizer_2", "text_encoder_2") if parts.get(n) is None]
    _check_whole(pipe, missing)
    _check_channels(pipe.unet, pipe.vae)
    _check_unet(pipe.unet, added=(None, "text_time"), projected=(None, "text_proj"))
    _check_parts(pipe, ("unet", "vae", "text_encoder", "text_encoder_2"), own_dtype=("vae",))


def check_kandinsky(pipe: Any) -> None:
    """Raise `ModelError` unless `pipe` is a whole, resident Kandinsky 2.1 or 2.2."""
    parts = getattr(pipe, "components", {})
    name = type(pipe).__name__
    if parts.get("unet") is None:
        raise ModelError(
            f"{name} is a Kandinsky prior without a decoder, so it draws nothing: {_COMBINED}."
        )
    if "prior_prior" not in parts:
        raise ModelError(f"{name} is a Kandinsky decoder without its prior: {_COMBINED}.")
    if "prompt" not in inspect.signature(type(pipe).__call__).parameters or any(
        word in name for word in ("Img2Img", "Inpaint", "Controlnet")
    ):
        raise ModelError(f"{name} draws from a picture; fasttrace traces runs from a prompt alone.")
    missing = [n for n in _KANDINSKY if parts.get(n) is None]
    missing += [n for n in ("text_encoder", "tokenizer") if n in parts and parts[n] is None]
    _check_whole(pipe, missing)
    _check_channels(pipe.unet, pipe.movq)
    added = "text_image" if "text_encoder" in parts else "image"
    _check_unet(pipe.unet, added=(added,), projected=(f"{added}_proj",))
    own = ("unet", "movq", "prior_prior", "prior_text_encoder", "prior_image_encoder")
    # A picture's embedding is cast for the decoder, which may be of another dtype than the prior.
    _check_parts(pipe, (*own, "text_encoder"), own_dtype=("movq", "unet", "text_encoder"))
    if "text_encoder" in parts and _dtype(pipe.unet) != _dtype(pipe.text_encoder):
        raise ModelError(
            f"The decoder mixes dtypes (unet in {_dtype(pipe.unet)}, text_encoder in "
            f"{_dtype(pipe.text_encoder)}); load it with one, such as dtype=torch.float32."
        )


def _check_whole(pipe: Any, missing: Sequence[str]) -> None:
    if missing:
        raise ModelError(
            f"{type(pipe).__name__} was loaded without {', '.join(missing)}; load it whole."
        )


def _check_parts(pipe: Any, names: Sequence[str], own_dtype: Sequence[str]) -> None:
    """own_dtype: of parts that may be of another dtype than the rest."""
    parts = pipeline_modules(pipe)
    found = {name: parts[name] for name in names if name in parts}
    _check_resident(found)
    _check_dtypes({name: part for name, part in found.items() if name not in own_dtype})
    _check_scheduler(pipe.scheduler)


def _check_channels(unet: Any, decoder: Any) -> None:
    config = unet.config
    latent = getattr(decoder.config, "latent_channels", None)
    if config.in_channels != latent:
        raise ModelError(
            f"The UNet reads {config.in_channels} channels, latents have {latent}: "
            "this is an inpainting or image-conditioned model, without runs from a prompt alone."
        )


def _check_unet(
    unet: nn.Module, added: Sequence[str | None], projected: Sequence[str | None]
) -> None:
    config: Any = unet.config
    extra = getattr(config, "encoder_hid_dim_type", None)
    if extra not in projected:
        raise ModelError(
            f"The UNet's text goes through '{extra}' (an image adapter); unload the adapter first."
        )
    kind = getattr(config, "addition_embed_type", None)
    if kind not in added:
        raise ModelError(f"UNets with addition_embed_type '{kind}' are not supported here.")
    chunked = [n for n, m in unet.named_modules() if getattr(m, "_chunk_size", None) is not None]
    if chunked:
        raise ModelError(
            f"Feed-forward chunking is on in {len(chunked)} blocks (first: {chunked[0]}), so their "
            "outputs never exist whole; call set_chunk_feed_forward(None, 0) on those blocks."
        )


def _check_resident(parts: dict[str, nn.Module]) -> None:
    places = {}
    for name, part in parts.items():
        if any(hasattr(m, "_hf_hook") for m in part.modules()):
            raise ModelError(
                f"{name} is offloaded (accelerate moves its weights in and out); load the pipeline "
                "without offloading, or call pipe.remove_all_hooks() and pipe.to(device)."
            )
        _check_hooks(name, part)
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


def _check_hooks(name: str, part: nn.Module) -> None:
    """diffusers' own, which move weights, cast them, or reuse what earlier calls computed."""
    found = [
        (path, hook)
        for path, module in part.named_modules()
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    ]
    if not found:
        return
    path, kind = found[0]
    what = {
        "group_offloading": "is offloaded in groups (weights move in and out)",
        "layerwise_casting": "stores its weights in another dtype than it computes in",
    }.get(kind, f"has the hook '{kind}', which changes what a call computes")
    raise ModelError(f"{name} {what}, first at {path or name}; load the pipeline anew without it.")


def _check_dtypes(parts: dict[str, nn.Module]) -> None:
    found = {name: _dtype(part) for name, part in parts.items()}
    if len(set(found.values())) > 1:
        what = ", ".join(f"{name} in {dtype}" for name, dtype in found.items())
        raise ModelError(
            f"The pipeline mixes dtypes ({what}); load it with one, such as dtype=torch.float32."
        )


def _dtype(part: nn.Module) -> str:
    kinds = [p.dtype for p in part.parameters() if p.is_floating_point()]
    return str(kinds[0]).removeprefix("torch.") if kinds else ""


def _check_scheduler(scheduler: Any) -> None:
    lacking = [
        n for n in ("set_timesteps", "step", "init_noise_sigma") if not hasattr(scheduler, n)
    ]
    if lacking:
        raise ModelError(
            f"The scheduler {type(scheduler).__name__} has no {', '.join(lacking)}; "
            "set pipe.scheduler to one of diffusers' schedulers."
        )
