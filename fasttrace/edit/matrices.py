"""The weight matrices that an edit rewrites: found by site, checked, named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.selection import select_sites
from fasttrace.adapters.text import TextEncoder
from fasttrace.adapters.unet import kind_of
from fasttrace.edit.checks import parse_texts
from fasttrace.errors import ModelError, UsageError
from fasttrace.types import Site

# kind of site -> its linear layers whose inputs are the keys
PARTS = {"attn": ("out_proj",), "mlp": ("fc2",), "attn2": ("to_k", "to_v")}


@dataclass(frozen=True)
class Matrix:
    """One linear layer. Its name is the site's and its own: "text_encoder.layers.0.mlp.fc2"."""

    name: str
    site: Site
    module: nn.Linear

    @property
    def weight(self) -> Tensor:
        return self.module.weight.detach()

    @property
    def bias(self) -> Tensor | None:
        return None if self.module.bias is None else self.module.bias.detach()

    @property
    def of_text(self) -> bool:
        return self.site.component != "unet"


def matrices_at(model: Model, sites: Sequence[Site]) -> list[Matrix]:
    """Raises `UsageError` for a site without editable matrices, `ModelError` for weights that an
    edit in place would not reach."""
    modules = model.unet_modules() | {n: m for e in model.encoders for n, m in e.modules().items()}
    found = []
    for site in sites:
        if site.kind not in PARTS:
            raise UsageError(
                f"{site.name} is of kind '{site.kind}'; what can be edited is a text encoder's "
                "self_attn (its out_proj) or mlp (its fc2), and the UNet's attn2 (to_k and to_v)."
            )
        if site.reaches == "nothing":
            raise UsageError(
                f"{site.name} can't reach the denoiser, so an edit there does nothing."
            )
        owner = modules[site.name]
        _check_fused(site, owner)
        for part in PARTS[site.kind]:
            # XLM-Roberta's sites are linear layers themselves.
            module = owner if isinstance(owner, nn.Linear) else getattr(owner, part, None)
            name = f"{site.name}.{part}"
            _check_linear(name, module)
            found.append(Matrix(name, site, module))  # type: ignore[arg-type]  # checked
    _check_alone(model, found)
    return found


def find_sites(model: Model, wanted: str | Sequence[str]) -> list[Site]:
    """Sites by name, alias, kind or glob. Raises `UsageError` where nothing matches."""
    text = [s for e in model.encoders for s in e.sites()]
    expected = "site is a site's name, a glob, or a list of these"
    words = [wanted] if isinstance(wanted, str) else parse_texts(wanted, expected)
    if words and all(word in ("attn", "mlp") or word.startswith("text_encoder") for word in words):
        # Listing the UNet's own takes a forward on meta.
        return select_sites(text, words)
    height, width = (int(model.default(side)) for side in ("height", "width"))
    return select_sites([*text, *model.sites(height, width).every], words)


def encoder_of(model: Model, site: Site) -> TextEncoder:
    return next(e for e in model.encoders if e.name == site.component)


def find_matrix(model: Model, name: str) -> Matrix:
    """By the name an edit was saved with. Raises `ModelError` where the model has none."""
    place = name.rpartition(".")[0]
    sites = {s.name: s for e in model.encoders for s in e.sites()}
    if place in model.unet_modules():
        sites[place] = Site(place, kind_of(place), "unet", index=-1, shape=())
    found = matrices_at(model, [sites[place]]) if place in sites else []
    for matrix in found:
        if matrix.name == name:
            return matrix
    raise ModelError(f"This model has no {name}, which the edit changes.")


def _check_fused(site: Site, owner: nn.Module) -> None:
    # The processor alone: diffusers leaves `fused_projections` set when it unfuses.
    if type(getattr(owner, "processor", None)).__name__.startswith("Fused"):
        raise ModelError(
            f"{site.name} reads its fused projections, so a change of to_k or to_v would do "
            "nothing; call pipe.unfuse_qkv_projections() first."
        )


def _check_linear(name: str, module: Any) -> None:
    if hasattr(module, "base_layer"):
        raise ModelError(
            f"{name} carries an adapter (LoRA); fuse it with pipe.fuse_lora() and unload it, or "
            "unload it, and edit then."
        )
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or not isinstance(weight, Tensor):
        kind = type(module).__name__
        raise ModelError(f"{name} is a {kind}; only plain linear layers can be edited.")
    if not weight.is_floating_point() or type(module) is not nn.Linear:
        kind = f"{type(module).__name__} of {str(weight.dtype).removeprefix('torch.')}"
        raise ModelError(f"{name} is quantised ({kind}); load the model unquantised to edit it.")
    if weight.is_meta:
        raise ModelError(f"{name} is on the meta device and holds no numbers; load its weights.")
    if weight.is_inference():
        raise ModelError(
            f"{name} was loaded under torch.inference_mode() and can't be written; load it outside."
        )
    if not bool(torch.isfinite(weight.detach()).all()):
        raise ModelError(f"{name} holds NaN or infinite weights.")


def _check_alone(model: Model, matrices: Sequence[Matrix]) -> None:
    """A tied weight would change another layer with it."""
    owners: Counter[int] = Counter()
    parts: list[nn.Module] = [model.unet, *(e.module for e in model.encoders)]
    for part in parts:
        for _, module in part.named_modules(remove_duplicate=False):
            owners.update(id(p) for p in module.parameters(recurse=False))
    for matrix in matrices:
        if owners[id(matrix.module.weight)] > 1:
            raise ModelError(
                f"The weight of {matrix.name} is tied to another layer's, which an edit would "
                "change with it; give the layer a weight of its own first."
            )
