"""Site lists without weights, for `fasttrace sites`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fasttrace.adapters.architectures import ARCHITECTURES, NOTES
from fasttrace.adapters.load import json_object, loading_error, local_only, model_index, resolve
from fasttrace.adapters.selection import select_sites
from fasttrace.adapters.text import text_sites
from fasttrace.adapters.unet import discover
from fasttrace.errors import ModelError, UsageError
from fasttrace.types import Site

_DEFAULT_WINDOW = 77  # CLIP's text length, where a configuration leaves it out
# Component of a saved pipeline -> what it is called here, in the order their outputs are read.
_PARTS = {
    "unet": "unet",
    "prior_prior": "prior",
    "prior_text_encoder": "prior_text_encoder",
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
}


def list_sites(
    name: str, component: str = "unet", sites: str | Sequence[str] = "paper"
) -> list[Site]:
    """Sites of a known architecture, a pipeline folder or a hub id, in execution order.

    `name`: one of `ARCHITECTURES` ("sd15", "sdxl", "kandinsky22", ...), "embedded", a folder, a hub
    id; only configurations are read, the modules live on the meta device. `component`: "unet",
    "text_encoder" (every encoder) or "prior" (Kandinsky's, which is listed and not traced). Raises
    `ModelError` for an unknown model, `UsageError` for unknown sites or components.
    """
    if component not in ("unet", "text_encoder", "prior"):
        raise UsageError(f"Unknown component '{component}'; expected unet, text_encoder or prior.")
    configs = configurations(name)
    if component == "unet":
        encoders = [config for part, config in configs.items() if "text_encoder" in part]
        found = unet_sites(configs["unet"], _window(encoders[0] if encoders else {}))
    elif component == "prior":
        if "prior" not in configs:
            raise UsageError(f"'{name}' has no prior; Kandinsky 2.1 and 2.2 have one.")
        found = prior_sites(configs["prior"])
    else:
        found = encoder_sites(configs)
        if not found:
            raise UsageError(f"The text encoder of '{name}' has no sites that fasttrace knows.")
    return select_sites(found, sites)


def notes(name: str) -> tuple[str, ...]:
    """Sentences that explain a listing: what its kinds of site are, what of it isn't traced."""
    if name in ARCHITECTURES:
        return NOTES.get(name, ())
    kind = str(configurations(name)["unet"].get("addition_embed_type"))
    like = {"image": "kandinsky22", "text_image": "kandinsky21", "text": "if"}.get(kind, "")
    return NOTES.get(like, ())


def configurations(name: str) -> dict[str, dict[str, Any]]:
    """The configurations of the UNet and of every text encoder, by component."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    source = resolve(name)
    if isinstance(source, Path):
        index = model_index(source)
    else:
        index = _hub_json(source, "model_index.json")
    parts = [p for p in _PARTS if _listed(index.get(p))]
    decodes = _listed(index.get("movq"))  # Kandinsky's decoder, whose text may be its prior's alone
    if "unet" not in parts or not (decodes or any("text_encoder" in p for p in parts)):
        raise ModelError(f"'{name}' has no UNet with a text encoder; fasttrace can't trace it.")
    return {_PARTS[p]: _read(source, f"{p}/config.json") for p in parts}


def _listed(entry: Any) -> bool:
    """Whether an entry of model_index.json names a component; an absent one is [null, null]."""
    return isinstance(entry, list) and len(entry) > 0 and entry[0] is not None


def unet_sites(config: dict[str, Any], window: int) -> list[Site]:
    """Sites of a UNet built from its configuration on the meta device, at its own sample size."""
    from diffusers import UNet2DConditionModel

    build: Any = UNet2DConditionModel.from_config
    try:
        with torch.device("meta"):
            unet = build(config)
        size = unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
    except Exception as error:
        raise ModelError(f"No UNet can be built from its configuration: {error}.") from error
    return list(discover(unet, height, width, window).every)


def prior_sites(config: dict[str, Any]) -> list[Site]:
    """Sites of a prior as a denoiser. Its tokens: the text's, its pooled vector, time, image."""
    width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    length = int(config["num_embeddings"]) + int(config["additional_embeddings"])
    names = [
        (f"prior.transformer_blocks.{layer}.{kind}", kind)
        for layer in range(int(config["num_layers"]))
        for kind in ("attn1", "ff")
    ]
    return [
        Site(name=name, kind=kind, component="prior", index=i, shape=(length, width))
        for i, (name, kind) in enumerate(names)
    ]


def encoder_sites(configs: dict[str, dict[str, Any]]) -> list[Site]:
    joined = "text_encoder_2" in configs
    found: list[Site] = []
    for name, config in configs.items():
        if "text_encoder" in name:
            lacking = [k for k in ("num_hidden_layers", "hidden_size") if k not in config]
            if lacking:
                raise ModelError(f"The configuration of {name} has no {', '.join(lacking)}.")
            found += text_sites(
                name,
                config["num_hidden_layers"],
                _window(config),
                config["hidden_size"],
                penultimate=joined,
                pooled=joined and name == "text_encoder_2",
            )
    return found


def _window(config: dict[str, Any]) -> int:
    if "transformerDimensions" in config:  # has places for more than Kandinsky's pipeline reads
        return _DEFAULT_WINDOW
    return int(config.get("max_position_embeddings", _DEFAULT_WINDOW))


def _read(source: Path | str, file: str) -> dict[str, Any]:
    if isinstance(source, str):
        return _hub_json(source, file)
    return json_object(source / file, f"{file} of '{source.name}'")


def _hub_json(repository: str, file: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(repository, file, local_files_only=local_only(repository))
    except Exception as error:
        raise loading_error(repository, repository, error) from error
    return json_object(Path(path), f"{file} of '{repository}'")
