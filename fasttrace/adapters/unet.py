"""UNet sites: found by place in the module tree, ordered and measured by one empty forward."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fasttrace.adapters.hooks import tensor_of
from fasttrace.errors import ModelError
from fasttrace.plugins import SITE_KINDS, brief, plugins, warn
from fasttrace.types import Site

KINDS = ("resnet", "attn1", "attn2", "ff", "added_kv")
WHOLE = {"attentions": "transformer", "up_blocks": "block"}  # parent -> kind of its members
_SITE = re.compile(
    r"(?:^|\.)(?:resnets\.\d+|attn1|attn2|ff|attentions\.\d+|up_blocks\.\d+|mid_block)$"
)
_WORDS = {"attn1": "self-attn", "attn2": "cross-attn", "ff": "ff", "added_kv": "added-kv"}


@dataclass(frozen=True)
class UnetSites:
    """The default set in execution order, and which of them read the text embedding directly.

    whole: transformers and up and middle blocks as single sites (their index comes behind). Down
    blocks are none: they also give skips, which a site's output does not hold.
    """

    sites: tuple[Site, ...]
    text_fed: frozenset[str]
    whole: tuple[Site, ...] = ()

    @property
    def every(self) -> tuple[Site, ...]:
        return self.sites + self.whole


def site_modules(unet: nn.Module) -> dict[str, nn.Module]:
    """Modules of all sites by name, in registration (not execution) order; others' kinds last."""
    found = {f"unet.{path}": m for path, m in unet.named_modules() if _SITE.search(path)}
    return found | {name: module for name, (_, module) in registered(unet, found).items()}


def registered(unet: nn.Module, known: Collection[str]) -> dict[str, tuple[str, nn.Module]]:
    """Sites of kinds that other packages register: name -> kind, module. known: the own ones'.

    A kind is a function of the UNet that gives module paths. One that fails is left out with a
    warning, and so is a path that is none.
    """
    found: dict[str, tuple[str, nn.Module]] = {}
    modules: dict[str, nn.Module] = {}
    for kind, paths_of in plugins(SITE_KINDS).items():
        modules = modules or dict(unet.named_modules())
        try:
            paths = [str(path).removeprefix("unet.") for path in paths_of(unet)]
        except Exception as error:
            warn(SITE_KINDS, kind, f"fails on this UNet ({brief(error)})")
            continue
        for path in paths:
            name = f"unet.{path}"
            if not path or path not in modules:
                warn(SITE_KINDS, kind, f"names {path[:120]!r}, which is no module of this UNet")
            elif name not in known and name not in found and name not in _unfit.get(unet, ()):
                found[name] = (kind, modules[path])
    return found


# Registered sites that a UNet's forward pass doesn't call once, found when it was last listed.
_unfit: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def kind_of(path: str, module: nn.Module | None = None) -> str:
    """`attentions.N` is a transformer, or with added keys and values an attention by itself."""
    parent, _, tail = path.rpartition(".")
    if getattr(module, "add_k_proj", None) is not None:
        return "added_kv"
    if tail.isdigit():
        return WHOLE.get(parent.rpartition(".")[2], "resnet")
    return "block" if tail == "mid_block" else tail


def discover(unet: Any, height: int, width: int, tokens: int) -> UnetSites:
    """Run the UNet once on the meta device and note what is called when, and with which shape.

    height, width: of the latents. `tokens`: length of the text. No weight is read, so the UNet may
    itself live on meta; its parameters are swapped for meta ones during the call and put back.
    """
    _unfit.pop(unet, None)
    modules = site_modules(unet)
    others = registered(unet, {n for n in modules if _SITE.search(n)})
    kinds = {name: kind_of(name, module) for name, module in modules.items()}
    kinds |= {name: kind for name, (kind, _) in others.items()}
    calls: Counter[str] = Counter()
    seen: dict[str, tuple[int, ...]] = {}
    fed: set[str] = set()
    handles = []

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
            calls[name] += 1
            if name in others and not isinstance(tensor_of(output), torch.Tensor):
                return
            seen[name] = tuple(tensor_of(output).shape[1:])
            if kwargs.get("encoder_hidden_states") is not None and kinds[name] in KINDS:
                fed.add(name)

        return hook

    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(note(name), with_kwargs=True))
        meta = torch.device("meta")
        state = {
            n: torch.empty_like(t, device=meta)
            for n, t in (*unet.named_parameters(), *unet.named_buffers())
        }
        with torch.no_grad():
            inputs = meta_inputs(unet.config, 1, height, width, tokens, _dtype(unet))
            torch.func.functional_call(unet, state, (), inputs)
    finally:
        for handle in handles:
            handle.remove()
    for name in others:
        if name not in seen or calls[name] != 1:
            times = f"is called {calls[name]} times" if calls[name] != 1 else "gives no tensor"
            warn(SITE_KINDS, kinds[name], f"names {name}, which {times} in a forward pass")
            _unfit.setdefault(unet, set()).add(name)
            seen.pop(name, None)
    if not any(kinds[name] in KINDS for name in seen):
        raise ModelError(
            "The UNet has none of the sites fasttrace knows (resnets, attn1, attn2, ff)."
        )
    # The default set first: the others' indices come behind it.
    names = sorted(seen, key=lambda name: kinds[name] not in KINDS)
    found = [
        Site(name=name, kind=kinds[name], component="unet", index=i, shape=seen[name])
        for i, name in enumerate(names)
    ]
    own = [site for site in found if site.kind in KINDS]
    return UnetSites(tuple(with_aliases(own)), frozenset(fed), tuple(found[len(own) :]))


def with_aliases(sites: list[Site]) -> list[Site]:
    """Add the paper's names (Basu et al. 2024, figures 3 and 4).

    `{down|mid|up}-{block}-resnet-{k}` counts inside the block. `self-attn-{i}-{stage}`,
    `cross-attn-{i}-{stage}` and `ff-{i}-{stage}` count through the stage (all down blocks, the
    middle, all up blocks) in execution order, from 0.
    """
    counts: Counter[str] = Counter()
    named = []
    for site in sites:
        parts = site.name.split(".")
        stage = parts[1].split("_")[0]
        if site.kind == "resnet":
            block = parts[2] if parts[2].isdigit() else "0"
            alias = f"{stage}-{block}-resnet-{parts[-1]}"
        else:
            word = _WORDS[site.kind]
            alias = f"{word}-{counts[word + stage]}-{stage}"
            counts[word + stage] += 1
        named.append(replace(site, aliases=(alias,)))
    return named


def input_shapes(config: Any, rows: int, height: int, width: int, tokens: int) -> dict[str, Any]:
    """Shapes of everything a UNet reads for so many rows, nested as its keyword arguments are.

    height, width: of the latents. tokens: length of the text.
    """
    text = config.cross_attention_dim
    if getattr(config, "encoder_hid_dim", None) is not None:
        text = config.encoder_hid_dim
    text = text[0] if isinstance(text, tuple | list) else text
    found: dict[str, Any] = {"sample": (rows, config.in_channels, height, width)}
    if getattr(config, "encoder_hid_dim_type", None) != "image_proj":
        found["encoder_hidden_states"] = (rows, tokens, text)
    if getattr(config, "time_cond_proj_dim", None) is not None:
        found["timestep_cond"] = (rows, config.time_cond_proj_dim)
    added = getattr(config, "addition_embed_type", None)
    if added == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        found["added_cond_kwargs"] = {"text_embeds": (rows, pooled), "time_ids": (rows, 6)}
    elif added == "image":
        found["added_cond_kwargs"] = {"image_embeds": (rows, text)}
    elif added == "text_image":  # both as wide as the keys' input
        width_of = config.cross_attention_dim
        found["added_cond_kwargs"] = {
            "text_embeds": (rows, width_of),
            "image_embeds": (rows, width_of),
        }
    return found


def _dtype(unet: nn.Module) -> torch.dtype:
    return next(iter(unet.parameters())).dtype


def meta_inputs(
    config: Any, rows: int, height: int, width: int, tokens: int, dtype: torch.dtype
) -> dict[str, Any]:
    """A UNet's keyword arguments on meta, as `input_shapes` says, with a timestep a row."""

    def empty(shape: Any) -> Any:
        if isinstance(shape, dict):
            return {name: empty(inner) for name, inner in shape.items()}
        return torch.empty(shape, device="meta", dtype=dtype)

    timestep = torch.empty(rows, device="meta", dtype=torch.int64)
    shapes = input_shapes(config, rows, height, width, tokens)
    found = {name: empty(shape) for name, shape in shapes.items()}
    # An argument that has to be there, though some read no text.
    return {"encoder_hidden_states": None} | found | {"timestep": timestep, "return_dict": False}
