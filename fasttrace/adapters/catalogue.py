"""Site lists without weights, for `fasttrace sites`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fasttrace.adapters.architectures import ARCHITECTURES
from fasttrace.adapters.load import json_object, loading_error, local_only, model_index, resolve
from fasttrace.adapters.selection import select_sites
from fasttrace.adapters.text import text_sites
from fasttrace.adapters.unet import discover
from fasttrace.errors import ModelError, UsageError
from fasttrace.types import Site

_DEFAULT_WINDOW = 77  # CLIP's text length, where a configuration leaves it out


def list_sites(
    name: str, component: str = "unet", sites: str | Sequence[str] = "paper"
) -> list[Site]:
    """Sites of a known architecture, a pipeline folder or a hub id, in execution order.

    `name`: "sd14", "sd15", "openjourney", "sd21", "sdxl", "embedded", a folder, a hub id; only
    configurations are read, the modules live on the meta device. `component`: "unet" or
    "text_encoder" (every encoder). Raises `ModelError` for an unknown model, `UsageError` for
    unknown sites or components.
    """
    if component not in ("unet", "text_encoder"):
        raise UsageError(f"Unknown component '{component}'; expected unet or text_encoder.")
    configs = configurations(name)
    if component == "unet":
        found = unet_sites(configs["unet"], _window(configs["text_encoder"]))
    else:
        found = encoder_sites(configs)
    return select_sites(found, sites)


def configurations(name: str) -> dict[str, dict[str, Any]]:
    """The configurations of the UNet and of every text encoder, by component."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    source = resolve(name)
    if isinstance(source, Path):
        index = model_index(source)
    else:
        index = _hub_json(source, "model_index.json")
    parts = [p for p in ("unet", "text_encoder", "text_encoder_2") if _listed(index.get(p))]
    if "unet" not in parts or "text_encoder" not in parts:
        raise ModelError(f"'{name}' has no UNet with a text encoder; fasttrace can't trace it.")
    return {p: _read(source, f"{p}/config.json") for p in parts}


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


def encoder_sites(configs: dict[str, dict[str, Any]]) -> list[Site]:
    joined = "text_encoder_2" in configs
    found: list[Site] = []
    for name, config in configs.items():
        if name.startswith("text_encoder"):
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
