"""What model this is: one hash over configurations, vocabularies and every weight's bytes."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from fasttrace.adapters.scope import pipeline_modules

# What a trace reads; a safety checker or an image encoder changes no score.
_COUNTED = (
    "unet",
    "vae",
    "text_encoder",
    "text_encoder_2",
    "movq",
    "prior_prior",
    "prior_text_encoder",
    "prior_image_encoder",  # gives the unconditional image embedding
)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, so that equal values hash alike."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON, as hex."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def tensor_digest(tensor: torch.Tensor) -> str:
    """sha256 of a tensor's dtype, shape and bytes."""
    head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    sha = hashlib.sha256(head)
    sha.update(flat.numpy().data)
    return sha.hexdigest()


def module_digest(module: nn.Module) -> str:
    """sha256 over a module's configuration and state, in the state's own order of names."""
    module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper renames every tensor
    state = module.state_dict()
    with ThreadPoolExecutor() as pool:  # hashlib releases the interpreter lock
        hashes = list(pool.map(tensor_digest, state.values()))
    return digest([_config(module), list(zip(state.keys(), hashes, strict=True))])


def fingerprint(pipe: Any) -> str:
    """sha256 over the pipeline's traced parts. One changed weight or token changes it."""
    parts = pipeline_modules(pipe)
    found: dict[str, Any] = {n: module_digest(parts[n]) for n in _COUNTED if n in parts}
    for name in ("tokenizer", "tokenizer_2", "prior_tokenizer"):
        tokenizer = getattr(pipe, name, None)
        if tokenizer is not None:
            found[name] = digest([tokenizer.get_vocab(), tokenizer.model_max_length])
    return digest(found)


def _config(module: nn.Module) -> dict[str, Any]:
    config: Any = getattr(module, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
    # Where a model was loaded from, and by which release, doesn't change what it computes.
    return {
        k: v
        for k, v in values.items()
        if not k.startswith("_") and k not in ("transformers_version", "dtype", "torch_dtype")
    }
